#include "cuda/bias_activation_launch.cuh"

namespace fastgpt::cuda {

void bias_activation(Type type, Type bias_type, const BiasActivationArgs& a, Stream stream) {
  launch_bias_activation<false>(type, bias_type, a, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace fastgpt::cuda
