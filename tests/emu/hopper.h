// Hopper's asynchronous machinery on the emulator: mbarriers, tensor copies, the products of a warpgroup, registers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core.h"

// The fields of the driver's opaque map that the emulation needs; made by include/cuda/tensor_map.cuh.
struct alignas(64) CUtensorMap {
  const unsigned char* base;
  uint64_t size[4], stride[4];  // stride in bytes
  uint32_t box[4];
};

namespace emu {

void mbarrier_init(uint32_t barrier, uint32_t count);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, int64_t expected_bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void tensor_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, const int (&at)[4]);

uint32_t swizzled(uint32_t address);  // by 128 bytes

// One m64nNk16 product, `columns` N. `a` is a descriptor, or the lane's four registers where a_registers is not null;
// with left_transposed both operands are MN-major. `widen` widens a half.
struct Product {
  uint64_t a, b;
  int columns;
  bool accumulate, from_registers, left_transposed;
  float (*widen)(uint16_t);
};
void wgmma_issue(const Product& product, float* d, const uint32_t* a_registers);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned in_flight);

void set_registers(unsigned count, bool increase);

}  // namespace emu
