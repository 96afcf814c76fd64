// CUDA C++ for g++: what the kernels of csrc/cuda use of the language, on the core; force-included before them.
//
// What is not here does not compile, which is meant: a kernel that needs more adds it here with its checks. bf16 and
// fp16 have no arithmetic of their own, since the kernels compute in fp32.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core.h"
#include "half.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __maxnreg__(n)

// ---- vectors

#define EMU_VECTORS(T, name, alignment)                                              \
  struct name##1 { T x; };                                                           \
  struct alignas(alignment * 2) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(alignment * 4 > 16 ? 16 : alignment * 4) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTORS(float, float, 4)
EMU_VECTORS(int, int, 4)
EMU_VECTORS(unsigned, uint, 4)
EMU_VECTORS(short, short, 2)
EMU_VECTORS(unsigned short, ushort, 2)
EMU_VECTORS(long long, longlong, 8)
EMU_VECTORS(unsigned long long, ulonglong, 8)
EMU_VECTORS(double, double, 8)

inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define threadIdx (emu::self().index)
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())
constexpr int warpSize = 32;

// ---- meetings

inline void __syncthreads() { emu::barrier_sync(0, blockDim.x * blockDim.y * blockDim.z); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::warp_meet(mask, "__syncwarp", nullptr, nullptr, true); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emu {

struct Shuffle {
  uint64_t value, result;
  unsigned from;  // the lane this one reads
};

inline void shuffle_execute(void* const* lanes, unsigned mask) {
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    auto me = static_cast<Shuffle*>(lanes[l]);
    if (!(mask >> me->from & 1))
      fail("lane %u reads lane %u by a shuffle, which mask %08x leaves out", l, me->from, mask);
    me->result = static_cast<Shuffle*>(lanes[me->from])->value;
  }
}

template <class T>
T shuffle(unsigned mask, T value, unsigned from, const char* name) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Shuffle s{0, 0, from};
  memcpy(&s.value, &value, sizeof value);
  warp_meet(mask, name, &s, shuffle_execute);
  memcpy(&value, &s.result, sizeof value);
  return value;
}

struct Vote {
  bool predicate;
  unsigned result;
};

inline void vote_execute(void* const* lanes, unsigned mask) {
  unsigned ballot = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if (mask >> l & 1 && static_cast<Vote*>(lanes[l])->predicate) ballot |= 1u << l;
  }
  for (unsigned l = 0; l < 32; ++l) {
    if (mask >> l & 1) static_cast<Vote*>(lanes[l])->result = ballot;
  }
}

inline unsigned vote(unsigned mask, bool predicate, const char* name) {
  Vote v{predicate, 0};
  warp_meet(mask, name, &v, vote_execute);
  return v.result;
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = emu::self().lane;
  return emu::shuffle(mask, value, (lane & ~(width - 1)) | (from & (width - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emu::self().lane, from = lane ^ bits;
  return emu::shuffle(mask, value, from < (lane | (width - 1)) + 1 ? from : lane, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = emu::self().lane;
  return emu::shuffle(mask, value, (lane & (width - 1)) + by < unsigned(width) ? lane + by : lane, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = emu::self().lane;
  return emu::shuffle(mask, value, (lane & (width - 1)) >= by ? lane - by : lane, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate, "__ballot_sync"); }
inline int __any_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate, "__any_sync") != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate, "__all_sync") == mask; }

// ---- atomics: a block's threads never run at once, so these are plain; ThreadSanitizer is told that they are ordered

template <class T, class F>
T emu_atomic(T* at, F change) {
  emu::pause();
  emu::acquire(at);
  const T before = *at;
  *at = change(before);
  emu::release(at);
  return before;
}
template <class T, class U>
T atomicAdd(T* at, U value) {
  return emu_atomic(at, [&](T x) { return T(x + T(value)); });
}
template <class T, class U>
T atomicMax(T* at, U value) {
  return emu_atomic(at, [&](T x) { return x > T(value) ? x : T(value); });
}
template <class T, class U>
T atomicMin(T* at, U value) {
  return emu_atomic(at, [&](T x) { return x < T(value) ? x : T(value); });
}
template <class T, class U>
T atomicOr(T* at, U value) {
  return emu_atomic(at, [&](T x) { return T(x | T(value)); });
}
template <class T, class U>
T atomicExch(T* at, U value) {
  return emu_atomic(at, [&](T) { return T(value); });
}
template <class T, class U, class V>
T atomicCAS(T* at, U expected, V value) {
  return emu_atomic(at, [&](T x) { return x == T(expected) ? T(value) : x; });
}

// ---- functions

template <class T>
T emu_bits_to(unsigned bits) {
  T value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float __uint_as_float(unsigned x) { return emu_bits_to<float>(x); }
inline float __int_as_float(int x) { return emu_bits_to<float>(unsigned(x)); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return int(lrintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}

template <class T, class U, class = std::enable_if_t<std::is_arithmetic_v<T> && std::is_arithmetic_v<U>>>
constexpr auto min(T a, U b) -> std::common_type_t<T, U> {
  using C = std::common_type_t<T, U>;
  return C(b) < C(a) ? C(b) : C(a);
}
template <class T, class U, class = std::enable_if_t<std::is_arithmetic_v<T> && std::is_arithmetic_v<U>>>
constexpr auto max(T a, U b) -> std::common_type_t<T, U> {
  using C = std::common_type_t<T, U>;
  return C(a) < C(b) ? C(b) : C(a);
}

// ---- the runtime's names that host code of the kernels' headers mentions

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), int, int bytes) {
  emu::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error of CUDA"; }

// ---- shared memory: what build.py makes of the two kinds of declaration

namespace emu {
template <class T>
T& shared_object(const void* key) {
  return *static_cast<T*>(shared_static(
      key, sizeof(T), alignof(std::remove_all_extents_t<T>) > 16 ? alignof(std::remove_all_extents_t<T>) : 16));
}
}  // namespace emu
