#include "cuda/swiglu_launch.cuh"

namespace fastgpt::cuda {

void swiglu(Type type, const SwigluArgs& a, Stream stream) {
  with_type(type, [&](auto t) { launch_swiglu<decltype(t), false>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

void swiglu_backward(Type type, const SwigluArgs& a, Stream stream) {
  with_type(type, [&](auto t) { launch_swiglu<decltype(t), true>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

}  // namespace fastgpt::cuda
