// The choice of a gated unit's kernel, shared by swiglu.cu and the emulation's tests.
#pragma once

#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"
#include "cuda/swiglu.cuh"

namespace fastgpt::cuda {

template <class T, bool kBackward>
void launch_swiglu(const SwigluArgs& a, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return;
  bool wide = aligned({a.gate, a.up, a.y, kBackward ? a.grad : a.y, kBackward ? a.dup : a.y}, 0);
  for (const int64_t n : {a.cols, a.gate_stride, a.up_stride, a.out_stride}) wide = wide && n % kWide<T> == 0;
  const int64_t work = a.rows * (a.cols / (wide ? kWide<T> : 1));
  const dim3 grid(blocks_of(std::min<int64_t>(132 * 16, (work + kSwigluThreads - 1) / kSwigluThreads)));
  const auto start = [&](auto wide_kernel, auto narrow_kernel) {
    launch(wide ? wide_kernel : narrow_kernel, grid, dim3(kSwigluThreads), 0, stream, a);
  };
  switch (a.kind) {
    case Activation::kGelu:
      return start(swiglu_kernel<T, kWide<T>, kBackward, Activation::kGelu>,
                   swiglu_kernel<T, 1, kBackward, Activation::kGelu>);
    case Activation::kGeluTanh:
      return start(swiglu_kernel<T, kWide<T>, kBackward, Activation::kGeluTanh>,
                   swiglu_kernel<T, 1, kBackward, Activation::kGeluTanh>);
    case Activation::kSilu:
      return start(swiglu_kernel<T, kWide<T>, kBackward, Activation::kSilu>,
                   swiglu_kernel<T, 1, kBackward, Activation::kSilu>);
    default:
      throw std::invalid_argument("kind: expected gelu, gelu_tanh or silu (3, 4 or 5)");
  }
}

}  // namespace fastgpt::cuda
