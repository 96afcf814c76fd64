#include "cuda/rope_launch.cuh"

namespace fastgpt::cuda {

void rope(Type type, const RopeArgs& a, Stream stream) {
  with_type(type, [&](auto t) { launch_rope<decltype(t)>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

}  // namespace fastgpt::cuda
