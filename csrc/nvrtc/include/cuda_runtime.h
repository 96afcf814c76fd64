// CUDA's words for a compiler without CUDA: what the launchers of csrc/cuda use of the runtime, on the driver
// (driver.cpp). The device's code is not here; see host_view.py.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__ __attribute__((visibility("default"), noinline))
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = struct CUstream_st*;
using cudaError_t = int;  // the driver's numbers, which the runtime shares
constexpr cudaError_t cudaSuccess = 0;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;

namespace fastgpt::nvrtc {

// Compiles the kernel where that was not done, and launches it. Raises std::runtime_error with the kernel's name.
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, void** arguments);
cudaError_t set_shared_bytes(const void* kernel, int bytes);

}  // namespace fastgpt::nvrtc

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* found);

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  return fastgpt::nvrtc::set_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}
