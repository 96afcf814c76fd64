// Whether this process can use a CUDA device, by the runtime that the module is linked with.
#include <cuda_runtime.h>

#include "cuda/kernels.cuh"

namespace fastgpt::cuda {

#ifdef __CUDACC__
const char* compiler() { return "nvcc"; }
#else
const char* compiler() { return "nvrtc"; }
#endif

const char* why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return count > 0 ? nullptr : "no CUDA device";
}

}  // namespace fastgpt::cuda
