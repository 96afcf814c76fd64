// The choice of an activation's kernel, shared by activation.cu and the emulation's tests.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {

// Blocks enough to fill any chip several times over; beyond that a thread walks on.
constexpr int64_t kMaxBlocks = 132 * 16;

template <class T, bool kBackward>
void launch_activation(const ActivationArgs& a, cudaStream_t stream) {
  if (a.n == 0) return;
  const int64_t wide = aligned({a.x, a.y, kBackward ? a.kept : a.x}, 0) ? a.n / kWide<T> * kWide<T> : 0;
  const int64_t work = wide ? std::max<int64_t>(wide / kWide<T>, a.n - wide) : a.n;
  const dim3 grid(blocks_of(std::min(kMaxBlocks, (work + kActivationThreads - 1) / kActivationThreads)));
  const auto start = [&](auto kernel) { launch(kernel, grid, dim3(kActivationThreads), 0, stream, a, wide); };
  switch (a.kind) {
    case Activation::kRelu:
      return start(activation_kernel<T, kBackward, Activation::kRelu>);
    case Activation::kSigmoid:
      return start(activation_kernel<T, kBackward, Activation::kSigmoid>);
    case Activation::kTanh:
      return start(activation_kernel<T, kBackward, Activation::kTanh>);
    case Activation::kGelu:
      return start(activation_kernel<T, kBackward, Activation::kGelu>);
    case Activation::kGeluTanh:
      return start(activation_kernel<T, kBackward, Activation::kGeluTanh>);
    case Activation::kSilu:
      return start(activation_kernel<T, kBackward, Activation::kSilu>);
  }
  throw std::invalid_argument("kind: expected 0 to 5");
}

}  // namespace fastgpt::cuda
