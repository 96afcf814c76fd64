// The names of csrc/cuda/ptx.cuh on the emulator.
#pragma once

#include "proxy.h"

namespace fastgpt::ptx {

inline void opaque(uint32_t&) {}

inline uint32_t shared_address(const void* pointer) { return emu::shared_address(pointer); }

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
  if (valid && reinterpret_cast<uintptr_t>(global) % 16)
    emu::fail("cp.async: the global address is not a multiple of 16");
  emu::copy_async(emu::shared_pointer(shared, 16, 16, "cp.async"), global, 16, valid ? 16 : 0);
}

inline void cp_async_commit() { emu::copy_async_commit(); }

template <int kInFlight>
void cp_async_wait() {
  emu::copy_async_wait(kInFlight);
}

struct LdMatrix {
  const uint16_t* row;
  uint32_t* result;
};

template <bool kTransposed>
void ldmatrix_execute(void* const* lanes, unsigned mask) {
  if (mask != 0xffffffffu) emu::fail("ldmatrix with mask %08x", mask);
  for (int m = 0; m < 4; ++m) {
    unsigned banks = 0;  // of 16 bytes
    for (int i = 0; i < 8; ++i) {
      banks |= 1u << (emu::shared_address(static_cast<LdMatrix*>(lanes[8 * m + i])->row) / 16 % 8);
    }
    if (banks != 0xff) emu::fail("ldmatrix: rows of matrix %d lie in the same banks", m);
  }
  for (int l = 0; l < 32; ++l) {
    for (int m = 0; m < 4; ++m) {
      const auto row = [&](int i) { return static_cast<LdMatrix*>(lanes[8 * m + i])->row; };
      const uint32_t low = kTransposed ? row(l % 4 * 2)[l / 4] : row(l / 4)[l % 4 * 2];
      const uint32_t high = kTransposed ? row(l % 4 * 2 + 1)[l / 4] : row(l / 4)[l % 4 * 2 + 1];
      static_cast<LdMatrix*>(lanes[l])->result[m] = low | high << 16;
    }
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  LdMatrix argument{static_cast<uint16_t*>(emu::shared_pointer(row, 16, 16, "ldmatrix")), r};
  emu::was_read(argument.row, 16);
  emu::warp_meet(0xffffffffu, "ldmatrix", &argument, ldmatrix_execute<false>);
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t row) {
  LdMatrix argument{static_cast<uint16_t*>(emu::shared_pointer(row, 16, 16, "ldmatrix.trans")), r};
  emu::was_read(argument.row, 16);
  emu::warp_meet(0xffffffffu, "ldmatrix.trans", &argument, ldmatrix_execute<true>);
}

struct StMatrix {
  unsigned char* row;
  const uint32_t* values;
};

inline void stmatrix_execute(void* const* lanes, unsigned mask) {
  if (mask != 0xffffffffu) emu::fail("stmatrix with mask %08x", mask);
  for (int m = 0; m < 4; ++m) {
    unsigned banks = 0;  // of 16 bytes
    for (int i = 0; i < 8; ++i) {
      unsigned char* row = static_cast<StMatrix*>(lanes[8 * m + i])->row;
      banks |= 1u << (emu::shared_address(row) / 16 % 8);
      for (int l = 0; l < 4; ++l) memcpy(row + 4 * l, &static_cast<StMatrix*>(lanes[4 * i + l])->values[m], 4);
    }
    if (banks != 0xff) emu::fail("stmatrix: rows of matrix %d lie in the same banks", m);
  }
}

inline void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  StMatrix argument{static_cast<unsigned char*>(emu::shared_pointer(row, 16, 16, "stmatrix")), r};
  emu::wrote(argument.row, 16);
  emu::warp_meet(0xffffffffu, "stmatrix", &argument, stmatrix_execute);
}

template <class T>
float half_to_float(uint32_t pair, int which) {
  const uint16_t bits = uint16_t(pair >> (16 * which));
  T value;
  memcpy(&value, &bits, 2);
  return value;
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};

template <class T>
void mma_execute(void* const* lanes, unsigned mask) {
  if (mask != 0xffffffffu) emu::fail("mma with mask %08x", mask);
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const Mma& m = *static_cast<Mma*>(lanes[l]);
    for (int r = 0; r < 4; ++r) {
      for (int e = 0; e < 2; ++e) a[l / 4 + 8 * (r & 1)][8 * (r / 2) + 2 * (l % 4) + e] = half_to_float<T>(m.a[r], e);
    }
    for (int e = 0; e < 2; ++e) {
      b[2 * (l % 4) + e][l / 4] = half_to_float<T>(m.b0, e);
      b[8 + 2 * (l % 4) + e][l / 4] = half_to_float<T>(m.b1, e);
    }
  }
  float d[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < 32; ++l) {
    float* out = static_cast<Mma*>(lanes[l])->d;
    for (int i = 0; i < 4; ++i) out[i] += d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma argument{d, a, b0, b1};
  emu::warp_meet(0xffffffffu, "mma.m16n8k16", &argument, mma_execute<T>);
}

inline float exp2_approx(float x) { return exp2f(x); }

template <class T>
uint32_t pack(float low, float high) {
  const T l(low), h(high);
  return uint32_t(l.bits) | uint32_t(h.bits) << 16;
}

// ---- sm_90a

inline void mbarrier_init(uint32_t barrier, uint32_t count) { emu::mbarrier_init(barrier, count); }
inline void fence_mbarrier_init() { emu::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint32_t barrier) { emu::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) { emu::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { emu::mbarrier_wait(barrier, parity); }
inline void tensor_load_4d(uint32_t shared, const void* map, uint32_t barrier, int x, int y, int z, int w) {
  emu::tensor_load(shared, *static_cast<const CUtensorMap*>(map), barrier, {x, y, z, w});
}
inline void tensor_store_4d(const void* map, uint32_t shared, int x, int y, int z, int w) {
  emu::tensor_store(*static_cast<const CUtensorMap*>(map), shared, {x, y, z, w});
}
inline void bulk_add_float(float* global, uint32_t shared, uint32_t bytes) {
  emu::bulk_add_float(global, shared, bytes);
}
inline void bulk_commit() { emu::bulk_commit(); }
template <int kInFlight>
void bulk_wait_read() {
  emu::bulk_wait(kInFlight);
}
template <int kInFlight>
void bulk_wait() {
  emu::bulk_wait(kInFlight);
}
inline void fence_proxy_async() { emu::fence_proxy_async(); }
inline void prefetch_tensor_map(const void*) {}
inline void named_barrier_sync(int id, int threads) { emu::barrier_sync(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emu::barrier_arrive(id, threads); }
template <int kRegisters>
void registers_decrease() {
  emu::set_registers(kRegisters, false);
}
template <int kRegisters>
void registers_increase() {
  emu::set_registers(kRegisters, true);
}
inline void wgmma_fence() { emu::wgmma_fence(); }
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int kInFlight>
void wgmma_wait() {
  emu::wgmma_wait(kInFlight);
}
template <int kCount>
void keep(float (&)[kCount]) {}
template <int kCount>
void keep(uint32_t (&)[kCount][4]) {}

template <class T>
float widen(uint16_t bits) {
  T value;
  memcpy(&value, &bits, 2);
  return value;
}

template <class T, int kColumns>
void wgmma_ss(float (&d)[kColumns / 2], uint64_t a, uint64_t b, int accumulate) {
  emu::wgmma_issue({a, b, kColumns, accumulate != 0, false, false, widen<T>}, d, nullptr);
}

template <class T, int kColumns>
void wgmma_rs(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  emu::wgmma_issue({0, b, kColumns, accumulate != 0, true, false, widen<T>}, d, a);
}

template <class T, int kColumns>
void wgmma_tt(float (&d)[kColumns / 2], uint64_t a, uint64_t b, int accumulate) {
  emu::wgmma_issue({a, b, kColumns, accumulate != 0, false, true, widen<T>}, d, nullptr);
}

}  // namespace fastgpt::ptx
