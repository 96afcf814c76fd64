// softmax and log_softmax over rows, and their gradients.
//
//   v = scale x + mask,  y = exp(v - max v) / sum exp(v - max v),  or  y = v - max v - log sum exp(v - max v)
//   dx = scale y (g - sum g y),                                   or  dx = g - exp(y) sum g
//
// The in-register kernels read each element once; the others, for rows that are too wide or not aligned, read a row
// twice, the second time from the caches where it fits them. All arithmetic is in fp32.
#pragma once

#include "cuda/kernels.cuh"
#include "cuda/row.cuh"

namespace fastgpt::cuda {

// What a row adds and hides: its part of the mask and how many columns the causal rule leaves. kPlain: there is
// neither.
template <bool kPlain>
struct RowMask {
  const float* mask;
  int visible;
  float scale;

  __device__ __forceinline__ RowMask(const SoftmaxArgs& a, int64_t row) : mask(a.mask), scale(a.scale) {
    if (kPlain) return;
    const int64_t query = row % a.queries, head = row / a.queries % a.heads, batch = row / a.queries / a.heads;
    visible = static_cast<int>(a.causal ? query + a.cols - a.queries + 1 : a.cols);
    if (mask != nullptr) mask += batch * a.mask_stride[0] + head * a.mask_stride[1] + query * a.mask_stride[2];
  }
  __device__ __forceinline__ float operator()(int column, float x) const {
    x *= scale;
    if (kPlain) return x;
    if (mask != nullptr) x += mask[column];
    return column < visible ? x : -INFINITY;
  }
};

template <class T, int kThreads, int kVectors, bool kPlain>
__global__ void __launch_bounds__(kThreads == 32 ? 128 : kThreads) softmax_row_kernel(SoftmaxArgs a) {
  const int64_t row = row_of_thread<kThreads>();
  if (row >= a.batch * a.heads * a.queries) return;  // whole warps
  const RowMask<kPlain> value(a, row);
  Row<T, kThreads, kVectors> x;
  x.read(static_cast<const T*>(a.x) + row * a.cols, a.cols);
  float largest = -INFINITY;
  x.each(a.cols, [&](int column, float v) { largest = fmaxf(largest, value(column, v)); });
  largest = reduce<Max, kThreads>(largest);
  float sum = 0.0f;
  x.unpacked();
  x.each(a.cols, [&](int column, float v) { sum += expf(value(column, v) - largest); });
  sum = reduce<Sum, kThreads>(sum);
  x.unpacked();
  if (a.log) {
    const float log_sum = logf(sum);
    x.replace(x, a.cols, [&](int column, float v, float) { return value(column, v) - largest - log_sum; });
  } else {
    const float inverse = 1.0f / sum;
    x.replace(x, a.cols, [&](int column, float v, float) { return expf(value(column, v) - largest) * inverse; });
  }
  x.write(static_cast<T*>(a.y) + row * a.cols, a.cols);
}

// A block a row of any width, kElements an access: one walk for the largest value and the sum, one for the result.
template <class T, int kElements>
__global__ void __launch_bounds__(1024) softmax_pass_kernel(SoftmaxArgs a) {
  const int64_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x) * kElements, cols = static_cast<int>(a.cols);
  const RowMask<false> value(a, row);
  const T* x = static_cast<const T*>(a.x) + row * a.cols;
  T* y = static_cast<T*>(a.y) + row * a.cols;
  RunningSum exps;
  for (int j = static_cast<int>(threadIdx.x) * kElements; j < cols; j += step) {
    const Vector<T, kElements> v = load<kElements>(x + j);
    exps.add<kElements>([&](int e) { return value(j + e, to_float(v.v[e])); });
  }
  exps.join<1024>();
  const float largest = exps.top,
              sum = largest < INFINITY ? exps.sum : __int_as_float(0x7fffffff);  // NaN, as inf - inf
  const float log_sum = logf(sum), inverse = 1.0f / sum;
  for (int j = static_cast<int>(threadIdx.x) * kElements; j < cols; j += step) {
    Vector<T, kElements> v = load<kElements>(x + j);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float d = value(j + e, to_float(v.v[e])) - largest;
      v.v[e] = from_float<T>(a.log ? d - log_sum : expf(d) * inverse);
    }
    store<kElements>(y + j, v);
  }
}

template <class T, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads == 32 ? 128 : kThreads) softmax_backward_row_kernel(SoftmaxArgs a) {
  const int64_t row = row_of_thread<kThreads>();
  if (row >= a.batch * a.heads * a.queries) return;  // whole warps
  Row<T, kThreads, kVectors> grad, y;
  grad.read(static_cast<const T*>(a.x) + row * a.cols, a.cols);
  y.read(static_cast<const T*>(a.y_in) + row * a.cols, a.cols);
  float sum = 0.0f;
  grad.replace(y, a.cols, [&](int, float g, float p) {
    sum += a.log ? g : g * p;
    return g;
  });
  sum = reduce<Sum, kThreads>(sum);
  grad.unpacked();
  y.unpacked();
  grad.replace(y, a.cols, [&](int, float g, float p) { return a.log ? g - expf(p) * sum : a.scale * p * (g - sum); });
  grad.write(static_cast<T*>(a.y) + row * a.cols, a.cols);
}

template <class T, int kElements>
__global__ void __launch_bounds__(1024) softmax_backward_pass_kernel(SoftmaxArgs a) {
  const int64_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x) * kElements, cols = static_cast<int>(a.cols);
  const T* grad = static_cast<const T*>(a.x) + row * a.cols;
  const T* y = static_cast<const T*>(a.y_in) + row * a.cols;
  T* dx = static_cast<T*>(a.y) + row * a.cols;
  float sum = 0.0f;
  for (int j = static_cast<int>(threadIdx.x) * kElements; j < cols; j += step) {
    const Vector<T, kElements> g = load<kElements>(grad + j), p = load<kElements>(y + j);
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum += a.log ? to_float(g.v[e]) : to_float(g.v[e]) * to_float(p.v[e]);
  }
  sum = reduce<Sum, 1024>(sum);
  for (int j = static_cast<int>(threadIdx.x) * kElements; j < cols; j += step) {
    Vector<T, kElements> g = load<kElements>(grad + j);
    const Vector<T, kElements> p = load<kElements>(y + j);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float each = to_float(g.v[e]), of = to_float(p.v[e]);
      g.v[e] = from_float<T>(a.log ? each - expf(of) * sum : a.scale * of * (each - sum));
    }
    store<kElements>(dx + j, g);
  }
}

}  // namespace fastgpt::cuda
