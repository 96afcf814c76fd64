#include "cuda/bias_activation_launch.cuh"

namespace fastgpt::cuda {

void bias_activation_backward(Type type, Type bias_type, const BiasActivationArgs& a, Stream stream) {
  launch_bias_activation<true>(type, bias_type, a, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace fastgpt::cuda
