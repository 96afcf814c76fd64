// Rotary position embedding (arXiv 2104.09864): each pair of a head's first 2 P elements turns by its position's angle.
//
//   y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin,  in fp32; the other elements are copied; the inverse has -sin
//
// Pairs are (i, i + P), or (2 i, 2 i + 1) where they are interleaved. A thread turns kElements neighbouring pairs, or
// copies as many elements.
#pragma once

#include "cuda/dtype.cuh"
#include "cuda/kernels.cuh"

namespace fastgpt::cuda {

template <class T, int kElements, bool kInterleaved>
__global__ void __launch_bounds__(256) rope_kernel(RopeArgs a) {
  const int64_t turns = a.pairs / kElements, items = turns + (a.head_dim - 2 * a.pairs) / kElements;
  const int64_t total = a.batch * a.length * a.heads * items;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t item = i % items, head = i / items % a.heads;
    const int64_t position = i / items / a.heads % a.length, batch = i / items / a.heads / a.length;
    const T* x = static_cast<const T*>(a.x) + batch * a.x_stride[0] + head * a.x_stride[1] + position * a.x_stride[2];
    T* y = static_cast<T*>(a.y) + batch * a.y_stride[0] + head * a.y_stride[1] + position * a.y_stride[2];
    if (item >= turns) {
      const int64_t column = 2 * a.pairs + (item - turns) * kElements;
      store<kElements>(y + column, load<kElements>(x + column));
      continue;
    }
    const int64_t pair = item * kElements, angle = position * a.pairs + pair;
    const Vector<float, kElements> c = load<kElements>(a.cos + angle), s = load<kElements>(a.sin + angle);
    const int64_t left = kInterleaved ? 2 * pair : pair, right = kInterleaved ? 2 * pair + kElements : pair + a.pairs;
    const Vector<T, kElements> l = load<kElements>(x + left), r = load<kElements>(x + right);
    Vector<T, kElements> out_l, out_r;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int k1 = kInterleaved ? 2 * e : e, k2 = kInterleaved ? 2 * e + 1 : e + kElements;  // of l, then r
      const float x1 = to_float(k1 < kElements ? l.v[k1 % kElements] : r.v[k1 % kElements]);
      const float x2 = to_float(k2 < kElements ? l.v[k2 % kElements] : r.v[k2 % kElements]);
      const float sine = a.inverse ? -s.v[e] : s.v[e];
      const T y1 = from_float<T>(x1 * c.v[e] - x2 * sine), y2 = from_float<T>(x2 * c.v[e] + x1 * sine);
      (k1 < kElements ? out_l.v[k1 % kElements] : out_r.v[k1 % kElements]) = y1;
      (k2 < kElements ? out_l.v[k2 % kElements] : out_r.v[k2 % kElements]) = y2;
    }
    store<kElements>(y + left, out_l);
    store<kElements>(y + right, out_r);
  }
}

}  // namespace fastgpt::cuda
