// relu, sigmoid, tanh, gelu (erf and tanh) and silu, and their gradients; in fp32, one read and one write an element.
//
// Every warp walks the tensor with strides of the grid; the last elements, and all of a tensor that does not begin at
// 16 bytes, go one at a time.
#pragma once

#include <cmath>

#include "cuda/dtype.cuh"
#include "cuda/kernels.cuh"

namespace fastgpt::cuda {

constexpr int kActivationThreads = 256;
constexpr float kSqrt2OverPi = 0.79788456080286536f, kCubic = 0.044715f;

__device__ __forceinline__ float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

template <Activation kKind>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kKind == Activation::kRelu) return x < 0.0f ? 0.0f : x;  // NaN stays
  if constexpr (kKind == Activation::kSigmoid) return logistic(x);
  if constexpr (kKind == Activation::kTanh) return tanhf(x);
  if constexpr (kKind == Activation::kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  if constexpr (kKind == Activation::kGeluTanh) {
    return 0.5f * x * (1.0f + tanhf(kSqrt2OverPi * (x + kCubic * x * x * x)));
  }
  if constexpr (kKind == Activation::kSilu) return x / (1.0f + expf(-x));
}

// `kept` is the result for relu, sigmoid and tanh, the input for the others.
template <Activation kKind>
__device__ __forceinline__ float activate_backward(float g, float kept) {
  const float x = kept;
  if constexpr (kKind == Activation::kRelu) return kept <= 0.0f ? 0.0f : g;
  if constexpr (kKind == Activation::kSigmoid) return g * kept * (1.0f - kept);
  if constexpr (kKind == Activation::kTanh) return g * (1.0f - kept * kept);
  if constexpr (kKind == Activation::kGelu) {
    const float density = expf(-0.5f * x * x) * 0.39894228040143268f;
    return g * (0.5f * (1.0f + erff(x * 0.70710678118654752f)) + x * density);
  }
  if constexpr (kKind == Activation::kGeluTanh) {
    const float t = tanhf(kSqrt2OverPi * (x + kCubic * x * x * x));
    const float slope = kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
    return g * (0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * slope);
  }
  if constexpr (kKind == Activation::kSilu) {
    const float s = logistic(x);
    return g * s * (1.0f + x * (1.0f - s));
  }
}

template <class T, int kElements, bool kBackward, Activation kKind>
__device__ __forceinline__ void activation_range(const ActivationArgs& a, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(a.x), *kept = static_cast<const T*>(a.kept);
  T* y = static_cast<T*>(a.y);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * kElements;
  for (int64_t i = begin + (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kElements; i < end; i += step) {
    Vector<T, kElements> v = load<kElements>(x + i), k;
    if constexpr (kBackward) k = load<kElements>(kept + i);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if constexpr (kBackward) {
        v.v[e] = from_float<T>(activate_backward<kKind>(to_float(v.v[e]), to_float(k.v[e])));
      } else {
        v.v[e] = from_float<T>(activate<kKind>(to_float(v.v[e])));
      }
    }
    store<kElements>(y + i, v);
  }
}

// The elements before `wide` go 16 bytes at a time; it is a multiple of kWide<T>, and 0 where addresses do not allow
// it.
template <class T, bool kBackward, Activation kKind>
__global__ void __launch_bounds__(kActivationThreads) activation_kernel(ActivationArgs a, int64_t wide) {
  activation_range<T, kWide<T>, kBackward, kKind>(a, 0, wide);
  activation_range<T, 1, kBackward, kKind>(a, wide, a.n);
}

}  // namespace fastgpt::cuda
