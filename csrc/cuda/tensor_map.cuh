// The map of a (B, H, T, D) tensor for cp.async.bulk.tensor, made on the host by the driver.
//
// The driver's function is looked up through the runtime, so that nothing links against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastgpt {

// A box is 64 halves of each of `rows` rows of one head; it lands with the 128-byte swizzle. Strides in elements; what
// the box reaches past a head's last row is zero.
inline CUtensorMap heads_tensor_map(const char* name, const void* pointer, bool bfloat16, int dim, int length,
                                    int heads, int batch, int64_t row_stride, int64_t head_stride, int64_t batch_stride,
                                    int rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr)
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled (12.0 or later needed)");
  CUtensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(dim), cuuint64_t(length), cuuint64_t(heads), cuuint64_t(batch)};
  const cuuint64_t strides[] = {cuuint64_t(row_stride) * 2, cuuint64_t(head_stride) * 2, cuuint64_t(batch_stride) * 2};
  const cuuint32_t box[] = {64, cuuint32_t(rows), 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             const_cast<void*>(pointer), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::invalid_argument(std::string(name) + ": no tensor map for sizes " + std::to_string(batch) + ", " +
                                std::to_string(heads) + ", " + std::to_string(length) + ", " + std::to_string(dim) +
                                " (CUDA driver's error " + std::to_string(int(result)) + ")");
  }
  return map;
}

}  // namespace fastgpt
