#include "cuda/norm_launch.cuh"

namespace fastgpt::cuda {

void norm(Type x_type, Type type, Type param_type, const NormArgs& a, Stream stream) {
  launch_norm(x_type, type, param_type, a, reinterpret_cast<cudaStream_t>(stream));
}

void norm_backward(Type type, Type param_type, const NormBackwardArgs& a, Stream stream) {
  launch_norm_backward(type, param_type, a, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace fastgpt::cuda
