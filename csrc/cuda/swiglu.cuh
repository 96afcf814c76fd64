// Gated linear units (arXiv 2002.05202): y = f(gate) up, f silu or gelu, and the gradients of both; in fp32.
//
// A thread handles kElements neighbours of a row: 16 bytes where the columns, strides and addresses allow it, else one.
#pragma once

#include "cuda/activation.cuh"

namespace fastgpt::cuda {

constexpr int kSwigluThreads = 256;

template <class T, int kElements, bool kBackward, Activation kKind>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_kernel(SwigluArgs a) {
  const int64_t accesses = a.cols / kElements, total = a.rows * accesses;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = i / accesses, column = i % accesses * kElements;
    const Vector<T, kElements> gate = load<kElements>(static_cast<const T*>(a.gate) + row * a.gate_stride + column);
    const Vector<T, kElements> up = load<kElements>(static_cast<const T*>(a.up) + row * a.up_stride + column);
    Vector<T, kElements> y, dup;
    if constexpr (kBackward) {
      const Vector<T, kElements> grad = load<kElements>(static_cast<const T*>(a.grad) + row * a.cols + column);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float g = to_float(grad.v[e]), x = to_float(gate.v[e]);
        y.v[e] = from_float<T>(activate_backward<kKind>(g * to_float(up.v[e]), x));
        dup.v[e] = from_float<T>(g * activate<kKind>(x));
      }
      store<kElements>(static_cast<T*>(a.dup) + row * a.out_stride + column, dup);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        y.v[e] = from_float<T>(activate<kKind>(to_float(gate.v[e])) * to_float(up.v[e]));
      }
    }
    store<kElements>(static_cast<T*>(a.y) + row * a.out_stride + column, y);
  }
}

}  // namespace fastgpt::cuda
