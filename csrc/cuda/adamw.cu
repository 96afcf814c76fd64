#include "cuda/adamw_launch.cuh"

namespace fastgpt::cuda {

void adamw(Type shadow_type, const AdamwArgs& a, Stream stream) {
  launch_adamw(shadow_type, a, reinterpret_cast<cudaStream_t>(stream));
}

void grad_norm(Type type, const GradNormArgs& a, Stream stream) {
  with_type(type, [&](auto t) { launch_grad_norm<decltype(t)>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

}  // namespace fastgpt::cuda
