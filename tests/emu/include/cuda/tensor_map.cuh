// heads_tensor_map of csrc/cuda/tensor_map.cuh on the emulator, with the limits of the driver's cuTensorMapEncodeTiled.
#pragma once

#include <stdexcept>
#include <string>

#include "hopper.h"

namespace fastgpt {

inline CUtensorMap heads_tensor_map(const char* name, const void* pointer, bool, int dim, int length, int heads,
                                    int batch, int64_t row_stride, int64_t head_stride, int64_t batch_stride,
                                    int rows) {
  const auto refuse = [&](const char* why) { throw std::invalid_argument(std::string(name) + ": " + why); };
  CUtensorMap map = {static_cast<const unsigned char*>(pointer),
                     {uint64_t(dim), uint64_t(length), uint64_t(heads), uint64_t(batch)},
                     {2, uint64_t(row_stride) * 2, uint64_t(head_stride) * 2, uint64_t(batch_stride) * 2},
                     {64, uint32_t(rows), 1, 1}};
  if (reinterpret_cast<uintptr_t>(pointer) % 16) refuse("the address of a tensor map is a multiple of 16");
  for (int i = 0; i < 4; ++i) {
    if (map.size[i] == 0 || map.size[i] > (uint64_t{1} << 32)) refuse("a tensor map's sizes are 1 to 2^32");
    if (map.box[i] == 0 || map.box[i] > 256) refuse("a tensor map's box is 1 to 256 in each dimension");
    if (i > 0 && (map.stride[i] % 16 || map.stride[i] >= (uint64_t{1} << 40))) {
      refuse("a tensor map's strides are multiples of 16 bytes below 2^40");
    }
  }
  return map;
}

}  // namespace fastgpt
