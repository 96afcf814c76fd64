#include "cuda/softmax_launch.cuh"

namespace fastgpt::cuda {

void softmax(Type type, const SoftmaxArgs& a, Stream stream) {
  with_type(type, [&](auto tag) { launch_softmax<decltype(tag)>(a, false, reinterpret_cast<cudaStream_t>(stream)); });
}

void softmax_backward(Type type, const SoftmaxArgs& a, Stream stream) {
  with_type(type, [&](auto tag) { launch_softmax<decltype(tag)>(a, true, reinterpret_cast<cudaStream_t>(stream)); });
}

}  // namespace fastgpt::cuda
