#include "cuda/cross_entropy_launch.cuh"

namespace fastgpt::cuda {

void count_targets(const CrossEntropyArgs& a, Stream stream) {
  launch_count_targets(a, reinterpret_cast<cudaStream_t>(stream));
}

void cross_entropy(Type type, const CrossEntropyArgs& a, Stream stream) {
  with_type(type, [&](auto t) { launch_cross_entropy<decltype(t)>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

void cross_entropy_backward(Type type, const CrossEntropyArgs& a, Stream stream) {
  with_type(type,
            [&](auto t) { launch_cross_entropy_backward<decltype(t)>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

void scale_rows(Type type, const CrossEntropyArgs& a, Stream stream) {
  with_type(type, [&](auto t) { launch_scale_rows<decltype(t)>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

}  // namespace fastgpt::cuda
