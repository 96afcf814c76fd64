// The choice of a kernel of bias and activation, shared by bias_activation.cu and the emulation's tests.
#pragma once

#include "cuda/bias_activation.cuh"
#include "cuda/column_sum_launch.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {

template <class T, class P, bool kBackward, int kElements, bool kAny, Activation kKind>
void launch_bias_activation(const BiasActivationArgs& a, cudaStream_t stream) {
  const int64_t accesses = a.cols / kElements;
  const int64_t threads = std::clamp<int64_t>((accesses + 31) / 32 * 32, 32, kBiasThreads);
  const dim3 grid(blocks_of((accesses + threads - 1) / threads), blocks_of(a.part_count));
  const auto start = [&](auto kernel) { launch(kernel, grid, dim3(static_cast<unsigned>(threads)), 0, stream, a); };
  if constexpr (kBackward) {
    start(bias_activation_backward_kernel<T, P, kElements, kAny, kKind>);
  } else {
    start(bias_activation_kernel<T, P, kElements, kAny, kKind>);
  }
}

template <class T, class P, bool kBackward>
void launch_bias_activation(const BiasActivationArgs& a, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return;
  constexpr int kN = kWide<T>;
  const bool wide = aligned({a.x, a.y, kBackward ? a.kept : a.x}, a.cols * int64_t(sizeof(T))) &&
                    reinterpret_cast<std::uintptr_t>(a.bias) % 32 == 0;
  if (!wide) return launch_bias_activation<T, P, kBackward, 1, true, Activation::kRelu>(a, stream);
  switch (a.kind) {
    case Activation::kRelu:
      return launch_bias_activation<T, P, kBackward, kN, false, Activation::kRelu>(a, stream);
    case Activation::kSigmoid:
      return launch_bias_activation<T, P, kBackward, kN, false, Activation::kSigmoid>(a, stream);
    case Activation::kTanh:
      return launch_bias_activation<T, P, kBackward, kN, false, Activation::kTanh>(a, stream);
    case Activation::kGelu:
      return launch_bias_activation<T, P, kBackward, kN, false, Activation::kGelu>(a, stream);
    case Activation::kGeluTanh:
      return launch_bias_activation<T, P, kBackward, kN, false, Activation::kGeluTanh>(a, stream);
    case Activation::kSilu:
      return launch_bias_activation<T, P, kBackward, kN, false, Activation::kSilu>(a, stream);
  }
  throw std::invalid_argument("kind: expected 0 to 5");
}

template <bool kBackward>
void launch_bias_activation(Type type, Type bias_type, const BiasActivationArgs& a, cudaStream_t stream) {
  with_param_type(type, bias_type, [&](auto t, auto p) {
    using P = decltype(p);
    launch_bias_activation<decltype(t), P, kBackward>(a, stream);
    if constexpr (kBackward) {
      if (a.parts != nullptr) {
        launch_column_sum<P>({a.parts, a.part_count, 1, a.cols, {static_cast<P*>(a.dbias), nullptr}}, stream);
      }
    }
  });
}

}  // namespace fastgpt::cuda
