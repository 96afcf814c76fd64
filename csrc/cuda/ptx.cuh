// Every asm statement of the project: thin, typed wrappers, each named after its instruction of the PTX ISA (sections
// as in version 9.0). The kernels hold none, so that tests/emu can give the same names a meaning on a CPU.
//
// Shared memory is addressed by 32 bits, as PTX does: shared_address(pointer) once, then integers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fastgpt::ptx {

// No instruction: what is computed from `x` before and after this are two different things to the compiler.
__device__ __forceinline__ void opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }

// 9.7.9.19 cvta: the shared window's address of a generic pointer.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 9.7.9.25 cp.async: 16 bytes from global to shared memory, past the registers and L1; zeros where not `valid`, and
// then nothing is read. Its completion is seen by this thread after cp_async_wait, by others after a barrier besides.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kInFlight` of this thread's committed groups are on their way.
template <int kInFlight>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// 9.7.15.5.15 ldmatrix: four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8
// and gets, of each, the elements (l / 4, 2 (l % 4)) and the one beside it.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same of the transposed matrices: elements (2 (l % 4), l / 4) and the one below it.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// 9.7.15.5.14 mma.m16n8k16: D += A B, fp32 sums. A's registers hold rows l / 4 and l / 4 + 8 of columns 2 (l % 4) (0,
// 1) and 8 + 2 (l % 4) (2, 3); B's rows 2 (l % 4) and + 8 of column l / 4; D's rows l / 4 (0, 1) and l / 4 + 8 (2, 3)
// of columns 2 (l % 4) and the next.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 9.7.3.21 ex2.approx.ftz: 2^x within 2^-22 relative; 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 9.7.9.22 cvt.rn: two floats to a pair of halves, `low` in the low 16 bits.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// ---- sm_90a: bulk copies of tensors, their barriers, and the products of a warpgroup

// 9.7.13.15 mbarrier: in shared memory, 8 bytes. A phase ends when `count` arrivals came and all bytes that were
// announced have landed; wait(parity) returns once the phase of that parity (0 for the first) is over, so a fresh
// barrier passes wait(1).
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// 9.7.13.4: makes the initialisation seen by the async proxy and the cluster; a __syncthreads for the block besides.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and announce `bytes` that copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// 9.7.9.27.1.2 cp.async.bulk.tensor: the box of the map at coordinates (x, y, z, w) to shared memory, zeros outside of
// the tensor; its bytes, zeros too, are counted on the barrier. One thread issues it.
__device__ __forceinline__ void tensor_load_4d(uint32_t shared, const void* map, uint32_t barrier, int x, int y, int z,
                                               int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// 9.7.9.27.1.2, the other way: a box of shared memory to the tensor; what lies outside of the tensor is not written.
__device__ __forceinline__ void tensor_store_4d(const void* map, uint32_t shared, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// 9.7.9.25 (bulk copy) cp.reduce.async.bulk: `bytes` of floats in shared memory are added to those at `global`, each
// addition atomic; both addresses and the size are multiples of 16.
__device__ __forceinline__ void bulk_add_float(float* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}

// 9.7.9.25 cp.async.bulk.commit_group, wait_group: what a thread stored or added in bulk, in groups, as for cp.async.
// With `read` the wait is for shared memory to have been read; without for the writes to be done.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kInFlight>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kInFlight) : "memory");
}
template <int kInFlight>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// 9.7.13.4 membar, fence.proxy.async: what this thread wrote to shared memory is seen by the copy engine and by wgmma,
// which read through another path; before the barrier after which somebody starts them.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 9.7.15.5.16 stmatrix: four 8 x 8 matrices of 16-bit elements, the opposite of ldmatrix_x4.
__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// 9.7.13.1 bar: `threads` threads of the block meet at barrier `id`, 1 to 15 (0 is __syncthreads); arrive does not
// wait.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 9.7.19.5 setmaxnreg: a warpgroup gives registers back, or takes them; multiples of 8 from 24 to 256.
template <int kRegisters>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 9.7.16.7 wgmma: the fence comes before the first product and wherever registers of one were written by others; the
// wait leaves at most kInFlight committed groups, and only then may sums and operands be touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// Keeps the compiler, which knows nothing of the asynchronous products, from moving uses of `d` past this place: needed
// after the wait, and before the fence for all that was computed and goes into a product.
template <int kCount>
__device__ __forceinline__ void keep(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void keep(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// 9.7.16.5.2 wgmma.mma_async m64nNk16, D = A B (+ D), fp32 sums. D: thread l of warp w holds in d[i] row
// 16 w + l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2. Operands in shared memory are given by
// descriptors (hopper.cuh). `ss`: both there, both K-major. `rs`: A in registers, as mma_m16n8k16 has it for the warp's
// 16 rows, and B MN-major, which is a row-major (k, n) matrix. `tt`: both in shared memory, both MN-major.

#define FASTGPT_WGMMA_SUMS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTGPT_WGMMA_OUTPUTS_32                                                                              \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FASTGPT_WGMMA_TT_32(type)                                                            \
  asm volatile(                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " {" FASTGPT_WGMMA_SUMS_32 \
      "}, %16, %17, p, 1, 1, 1, 1;\n}\n"                                                     \
      : FASTGPT_WGMMA_OUTPUTS_32                                                             \
      : "l"(a), "l"(b), "r"(accumulate))

#define FASTGPT_WGMMA_SUMS_64                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTGPT_WGMMA_OUTPUTS_64                                                                              \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTGPT_WGMMA_SS_64(type)                                                            \
  asm volatile(                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FASTGPT_WGMMA_SUMS_64 \
      "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                                                     \
      : FASTGPT_WGMMA_OUTPUTS_64                                                             \
      : "l"(a), "l"(b), "r"(accumulate))
#define FASTGPT_WGMMA_TT_64(type)                                                            \
  asm volatile(                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FASTGPT_WGMMA_SUMS_64 \
      "}, %32, %33, p, 1, 1, 1, 1;\n}\n"                                                     \
      : FASTGPT_WGMMA_OUTPUTS_64                                                             \
      : "l"(a), "l"(b), "r"(accumulate))
#define FASTGPT_WGMMA_RS_64(type)                                                            \
  asm volatile(                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FASTGPT_WGMMA_SUMS_64 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"                                       \
      : FASTGPT_WGMMA_OUTPUTS_64                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define FASTGPT_WGMMA_SUMS_128                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTGPT_WGMMA_OUTPUTS_128                                                                             \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), \
      "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), \
      "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
      "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FASTGPT_WGMMA_SS_128(type)                                                             \
  asm volatile(                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" FASTGPT_WGMMA_SUMS_128 \
      "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                                                       \
      : FASTGPT_WGMMA_OUTPUTS_128                                                              \
      : "l"(a), "l"(b), "r"(accumulate))
#define FASTGPT_WGMMA_RS_128(type)                                                             \
  asm volatile(                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" FASTGPT_WGMMA_SUMS_128 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"                                         \
      : FASTGPT_WGMMA_OUTPUTS_128                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

template <class T, int kColumns>
__device__ __forceinline__ void wgmma_ss(float (&d)[kColumns / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kColumns == 64 || kColumns == 128);
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kColumns == 64 && kBFloat16) FASTGPT_WGMMA_SS_64("bf16");
  if constexpr (kColumns == 64 && !kBFloat16) FASTGPT_WGMMA_SS_64("f16");
  if constexpr (kColumns == 128 && kBFloat16) FASTGPT_WGMMA_SS_128("bf16");
  if constexpr (kColumns == 128 && !kBFloat16) FASTGPT_WGMMA_SS_128("f16");
}

template <class T, int kColumns>
__device__ __forceinline__ void wgmma_rs(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(kColumns == 64 || kColumns == 128);
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kColumns == 64 && kBFloat16) FASTGPT_WGMMA_RS_64("bf16");
  if constexpr (kColumns == 64 && !kBFloat16) FASTGPT_WGMMA_RS_64("f16");
  if constexpr (kColumns == 128 && kBFloat16) FASTGPT_WGMMA_RS_128("bf16");
  if constexpr (kColumns == 128 && !kBFloat16) FASTGPT_WGMMA_RS_128("f16");
}

template <class T, int kColumns>
__device__ __forceinline__ void wgmma_tt(float (&d)[kColumns / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kColumns == 32 || kColumns == 64);
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kColumns == 32 && kBFloat16) FASTGPT_WGMMA_TT_32("bf16");
  if constexpr (kColumns == 32 && !kBFloat16) FASTGPT_WGMMA_TT_32("f16");
  if constexpr (kColumns == 64 && kBFloat16) FASTGPT_WGMMA_TT_64("bf16");
  if constexpr (kColumns == 64 && !kBFloat16) FASTGPT_WGMMA_TT_64("f16");
}

}  // namespace fastgpt::ptx
