// The choice of a dropout kernel, shared by dropout.cu and the emulation's tests.
#pragma once

#include "cuda/dispatch.cuh"
#include "cuda/dropout.cuh"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {

template <class X, class T>
void launch_dropout(const DropoutArgs& a, cudaStream_t stream) {
  if (a.n == 0) return;
  const int64_t blocks = (a.n + 4 * kDropoutThreads - 1) / (4 * kDropoutThreads);
  const bool wide = aligned({a.x, a.residual, a.y}, 0);
  launch(wide ? dropout_kernel<X, T, true> : dropout_kernel<X, T, false>,
         dim3(blocks_of(std::min<int64_t>(blocks, 132 * 16))), dim3(kDropoutThreads), 0, stream, a);
}

inline void launch_dropout(Type x_type, Type type, const DropoutArgs& a, cudaStream_t stream) {
  with_type(x_type, [&](auto x) {
    using X = decltype(x);
    if (type == x_type) return launch_dropout<X, X>(a, stream);
    if (type == Type::kFloat32) return launch_dropout<X, float>(a, stream);
    throw std::invalid_argument("dropout: the result has x's type or float32");
  });
}

}  // namespace fastgpt::cuda
