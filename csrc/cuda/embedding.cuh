// Rows of a matrix by their numbers, and the gradient of the matrix.
//
// The backward gets the numbers sorted, each with its position, and adds the gradients of a number's positions in their
// order, in fp32 and without atomics: the same input gives the same bits. Numbers outside the matrix give rows of NaN
// and no gradient, since raising would wait for the device.
#pragma once

#include "cuda/dtype.cuh"
#include "cuda/kernels.cuh"

namespace fastgpt::cuda {

template <class T, int kElements>
__global__ void __launch_bounds__(256) embedding_kernel(EmbeddingArgs a) {
  const int64_t accesses = a.cols / kElements, total = a.count * accesses;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t position = i / accesses, column = i % accesses * kElements;
    const int64_t id = a.ids[position];
    Vector<T, kElements> v;
    if (id >= 0 && id < a.rows) {
      v = load<kElements>(static_cast<const T*>(a.x) + id * a.cols + column);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) v.v[e] = from_float<T>(__int_as_float(0x7fffffff));
    }
    store<kElements>(static_cast<T*>(a.y) + position * a.cols + column, v);
  }
}

constexpr int kAhead = 4;  // rows whose gradients are asked for before the first is added

// G: of the gradient, T: of the matrix. Block x begins at a sorted position and does all those of its number, if it is
// the first of them; block row y has some of the columns.
template <class G, class T, int kElements>
__global__ void __launch_bounds__(256) embedding_backward_kernel(EmbeddingArgs a) {
  const int64_t first = blockIdx.x, id = a.ids[first];
  if ((first > 0 && a.ids[first - 1] == id) || id < 0 || id >= a.rows || id == a.padding) return;
  int64_t end = first + 1;
  while (end < a.count && a.ids[end] == id) ++end;
  const G* grad = static_cast<const G*>(a.x);
  for (int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kElements; column < a.cols;
       column += int64_t(gridDim.y) * blockDim.x * kElements) {
    T* into = static_cast<T*>(a.y) + id * a.cols + column;
    Vector<float, kElements> sum;
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum.v[e] = 0.0f;
    int64_t i = first;
    for (; i + kAhead <= end; i += kAhead) {
      Vector<G, kElements> g[kAhead];
#pragma unroll
      for (int r = 0; r < kAhead; ++r) g[r] = load<kElements>(grad + a.positions[i + r] * a.cols + column);
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) sum.v[e] += to_float(g[r].v[e]);
      }
    }
    for (; i < end; ++i) {
      const Vector<G, kElements> g = load<kElements>(grad + a.positions[i] * a.cols + column);
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum.v[e] += to_float(g.v[e]);
    }
    Vector<T, kElements> out;
    if (a.keep) out = load<kElements>(into);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      out.v[e] = from_float<T>(a.keep ? to_float(out.v[e]) + sum.v[e] : sum.v[e]);
    }
    store<kElements>(into, out);
  }
}

}  // namespace fastgpt::cuda
