// An activation of x + bias, and its gradients; in fp32, each element read once.
//
// A block covers some neighbouring columns, whose bias its threads keep in registers, and walks the rows. In the
// backward each thread sums its columns' gradient on the way and leaves it for column_sum.cuh.
#pragma once

#include "cuda/activation.cuh"

namespace fastgpt::cuda {

constexpr int kBiasThreads = 128;

// The kind as a number, for the kernels of one element an access, which are few and slow anyway.
__device__ __forceinline__ float activate_any(Activation kind, float x) {
  switch (kind) {
    case Activation::kRelu:
      return activate<Activation::kRelu>(x);
    case Activation::kSigmoid:
      return activate<Activation::kSigmoid>(x);
    case Activation::kTanh:
      return activate<Activation::kTanh>(x);
    case Activation::kGelu:
      return activate<Activation::kGelu>(x);
    case Activation::kGeluTanh:
      return activate<Activation::kGeluTanh>(x);
    default:
      return activate<Activation::kSilu>(x);
  }
}

__device__ __forceinline__ float activate_backward_any(Activation kind, float g, float kept) {
  switch (kind) {
    case Activation::kRelu:
      return activate_backward<Activation::kRelu>(g, kept);
    case Activation::kSigmoid:
      return activate_backward<Activation::kSigmoid>(g, kept);
    case Activation::kTanh:
      return activate_backward<Activation::kTanh>(g, kept);
    case Activation::kGelu:
      return activate_backward<Activation::kGelu>(g, kept);
    case Activation::kGeluTanh:
      return activate_backward<Activation::kGeluTanh>(g, kept);
    default:
      return activate_backward<Activation::kSilu>(g, kept);
  }
}

// kAny: the kind is the argument's, not the template's.
template <class T, class P, int kElements, bool kAny, Activation kKind>
__global__ void __launch_bounds__(kBiasThreads) bias_activation_kernel(BiasActivationArgs a) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kElements;
  if (column >= a.cols) return;
  const Vector<P, kElements> raw = load<kElements>(static_cast<const P*>(a.bias) + column);
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const int64_t first = row * a.cols + column;
    Vector<T, kElements> v = load<kElements>(static_cast<const T*>(a.x) + first);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float x = to_float(v.v[e]) + to_float(raw.v[e]);
      v.v[e] = from_float<T>(kAny ? activate_any(a.kind, x) : activate<kKind>(x));
    }
    store<kElements>(static_cast<T*>(a.y) + first, v);
  }
}

// Block row y leaves the sums of its rows in parts[y], where parts are asked for.
template <class T, class P, int kElements, bool kAny, Activation kKind>
__global__ void __launch_bounds__(kBiasThreads) bias_activation_backward_kernel(BiasActivationArgs a) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kElements;
  if (column >= a.cols) return;
  const Activation kind = kAny ? a.kind : kKind;
  const bool keeps_result = kind == Activation::kRelu || kind == Activation::kSigmoid || kind == Activation::kTanh;
  Vector<float, kElements> bias, sum;
#pragma unroll
  for (int e = 0; e < kElements; ++e) bias.v[e] = sum.v[e] = 0.0f;
  if (!keeps_result) {
    const Vector<P, kElements> raw = load<kElements>(static_cast<const P*>(a.bias) + column);
#pragma unroll
    for (int e = 0; e < kElements; ++e) bias.v[e] = to_float(raw.v[e]);
  }
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const int64_t first = row * a.cols + column;
    Vector<T, kElements> g = load<kElements>(static_cast<const T*>(a.x) + first);
    const Vector<T, kElements> kept = load<kElements>(static_cast<const T*>(a.kept) + first);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float k = to_float(kept.v[e]) + bias.v[e], grad = to_float(g.v[e]);
      const float dx = kAny ? activate_backward_any(kind, grad, k) : activate_backward<kKind>(grad, k);
      sum.v[e] += dx;
      g.v[e] = from_float<T>(dx);
    }
    store<kElements>(static_cast<T*>(a.y) + first, g);
  }
  if (a.parts == nullptr) return;
  float* part = a.parts + int64_t(blockIdx.y) * a.cols + column;
#pragma unroll
  for (int e = 0; e < kElements; ++e) part[e] = sum.v[e];
}

}  // namespace fastgpt::cuda
