#include "cuda/activation_launch.cuh"

namespace fastgpt::cuda {

void activation(Type type, const ActivationArgs& a, Stream stream) {
  with_type(type, [&](auto t) { launch_activation<decltype(t), false>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

void activation_backward(Type type, const ActivationArgs& a, Stream stream) {
  with_type(type, [&](auto t) { launch_activation<decltype(t), true>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

}  // namespace fastgpt::cuda
