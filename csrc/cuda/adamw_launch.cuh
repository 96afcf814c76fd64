// Launches of the optimizer, shared by adamw.cu and the emulation's tests.
#pragma once

#include "cuda/adamw.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {

inline void launch_adamw(Type shadow_type, const AdamwArgs& a, cudaStream_t stream) {
  if (a.list.chunks == 0) return;
  const dim3 grid(blocks_of(a.list.chunks));
  if (shadow_type == Type::kFloat32) throw std::invalid_argument("adamw: shadows are bfloat16 or float16");
  launch(shadow_type == Type::kFloat16 ? adamw_kernel<f16> : adamw_kernel<bf16>, grid, dim3(kListThreads), 0, stream,
         a);
}

template <class T>
void launch_grad_norm(const GradNormArgs& a, cudaStream_t stream) {
  if (a.list.chunks > 0) {
    launch(grad_squares_kernel<T>, dim3(blocks_of(a.list.chunks)), dim3(kListThreads), 0, stream, a);
  }
  launch(grad_norm_kernel, dim3(1), dim3(kListThreads), 0, stream, a);
}

}  // namespace fastgpt::cuda
