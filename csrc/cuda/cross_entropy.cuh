// Cross-entropy of rows of logits with integer targets, and its gradient, which the forward can leave in the logits'
// place; in fp32, with a row's log-sum-exp in fp64.
//
//   l = log sum exp(x),  loss = (1 - s) (l - x[target]) + s (l - mean x) + z l^2
//   dx = (exp(x - l) (1 + 2 z l) - s / cols - (1 - s) [j = target]) times the loss's gradient
//
// Rows that fit the registers of a warp or a block are read once, gradient included; wider ones and those that are not
// aligned are read once for the loss and once more for the gradient. Ignored rows have loss and gradient 0; a target
// outside the classes makes both NaN, since raising would wait for the device.
#pragma once

#include "cuda/kernels.cuh"
#include "cuda/row.cuh"

namespace fastgpt::cuda {

constexpr int kCountThreads = 1024;

// x of one thread in all threads of a row.
template <int kThreads>
__device__ __forceinline__ double of_first(double x) {
  if constexpr (kThreads == 32) return __shfl_sync(0xffffffffu, x, 0);
  __shared__ double first;
  __syncthreads();  // the last one has been read
  if (threadIdx.x == 0) first = x;
  __syncthreads();  // the first thread has written
  return first;
}

// A sum of doubles over a block, in a fixed order; for the first thread only.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double sums[32];
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();  // every warp has written its sum
  x = 0.0;
  if (threadIdx.x == 0) {
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x += sums[warp];
  }
  return x;
}

// How many targets count, in one block.
__global__ void __launch_bounds__(kCountThreads) count_targets_kernel(CrossEntropyArgs a) {
  double count = 0.0;
  for (int64_t row = threadIdx.x; row < a.rows; row += blockDim.x) count += a.target[row] != a.ignore_index;
  count = block_sum(count);
  if (threadIdx.x == 0) *a.counted = count;
}

// The loss of all rows, in one block.
__global__ void __launch_bounds__(kCountThreads) total_loss_kernel(CrossEntropyArgs a) {
  double total = 0.0;
  for (int64_t row = threadIdx.x; row < a.rows; row += blockDim.x) total += a.losses[row];
  total = block_sum(total);
  if (threadIdx.x == 0) *a.loss = static_cast<float>(a.count != nullptr ? total / *a.count : total);
}

// What a row's gradient is made of, from its log-sum-exp and target.
struct RowGradient {
  float near, factor, even, scale;
  int64_t target;

  // grad: of the row's loss; count: null, or how many rows the mean is over.
  __device__ __forceinline__ RowGradient(const CrossEntropyArgs& a, double lse, int64_t target, float grad)
      : near(static_cast<float>(lse)), target(target) {
    const float rest = fabsf(near) < INFINITY ? static_cast<float>(lse - static_cast<double>(near)) : 0.0f;
    factor = (1.0f + 2.0f * a.z_loss * near) * (1.0f - rest);
    even = a.smoothing / static_cast<float>(a.cols);
    scale = a.count != nullptr ? grad / static_cast<float>(*a.count) : grad;
    if (target == a.ignore_index) scale = 0.0f;
    if (target != a.ignore_index && (target < 0 || target >= a.cols)) scale = __int_as_float(0x7fffffff);
    ignored = target == a.ignore_index;
    hit = 1.0f - a.smoothing;
  }
  __device__ __forceinline__ float operator()(int64_t column, float x) const {
    if (ignored) return 0.0f;
    const float p = expf(x - near) * factor - even;
    return (column == target ? p - hit : p) * scale;
  }

 private:
  float hit;
  bool ignored;
};

// A row's loss from what was summed; `sum` is of exp(x - top), `plain` of x, both over the whole row.
__device__ __forceinline__ double log_sum_exp(float top, float sum) {
  return static_cast<double>(top) + log(static_cast<double>(sum));
}

__device__ __forceinline__ float row_loss(const CrossEntropyArgs& a, double lse, int64_t target, float x, float plain) {
  if (target == a.ignore_index) return 0.0f;
  if (target < 0 || target >= a.cols) return __int_as_float(0x7fffffff);
  const float near = static_cast<float>(lse);
  float loss = (1.0f - a.smoothing) * (near - x);
  if (a.smoothing > 0.0f) loss += a.smoothing * (near - plain / static_cast<float>(a.cols));
  if (a.z_loss > 0.0f) loss += a.z_loss * near * near;
  return loss;
}

// The logit of the target, or 0 where there is none.
template <class T>
__device__ __forceinline__ float target_logit(const CrossEntropyArgs& a, const T* x, int64_t target) {
  return target >= 0 && target < a.cols ? to_float(x[target]) : 0.0f;
}

template <class T, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads == 32 ? 128 : kThreads) cross_entropy_row_kernel(CrossEntropyArgs a) {
  const int64_t row = row_of_thread<kThreads>();
  if (row >= a.rows) return;  // whole warps
  const int cols = static_cast<int>(a.cols);
  const T* logits = static_cast<const T*>(a.logits) + row * a.cols;
  const int64_t target = a.target[row];
  const float picked = target_logit(a, logits, target);
  __syncwarp();  // read before the gradient takes its place
  Row<T, kThreads, kVectors> x;
  x.read(logits, cols);
  float top = -INFINITY, plain = 0.0f;
  x.each(cols, [&](int, float v) { top = fmaxf(top, v); });
  top = finite_or_zero(reduce<Max, kThreads>(top));
  x.unpacked();
  float sum = 0.0f;
  x.each(cols, [&](int, float v) { sum += expf(v - top); });
  sum = reduce<Sum, kThreads>(sum);
  if (a.smoothing > 0.0f) {
    x.unpacked();
    x.each(cols, [&](int, float v) { plain += v; });
    plain = reduce<Sum, kThreads>(plain);
  }
  double lse = 0.0;
  if (threadIdx.x % kThreads == 0) {
    if (target != a.ignore_index) lse = log_sum_exp(top, sum);
    a.lse[row] = lse;
    a.losses[row] = row_loss(a, lse, target, picked, plain);
  }
  if (a.dlogits == nullptr) return;
  const RowGradient gradient(a, of_first<kThreads>(lse), target, 1.0f);
  x.unpacked();
  x.replace(x, cols, [&](int column, float v, float) { return gradient(column, v); });
  x.write(static_cast<T*>(a.dlogits) + row * a.cols, cols);
}

// The gradient of a row, kElements an access.
template <class T, int kElements>
__device__ __forceinline__ void write_gradient(const CrossEntropyArgs& a, const T* x, T* dx, const RowGradient& f) {
  for (int64_t j = int64_t(threadIdx.x) * kElements; j < a.cols; j += int64_t(blockDim.x) * kElements) {
    Vector<T, kElements> v = load<kElements>(x + j);
#pragma unroll
    for (int e = 0; e < kElements; ++e) v.v[e] = from_float<T>(f(j + e, to_float(v.v[e])));
    store<kElements>(dx + j, v);
  }
}

// A block a row of any width: one walk keeps the largest logit so far and the sum relative to it.
template <class T, int kElements>
__global__ void __launch_bounds__(1024) cross_entropy_pass_kernel(CrossEntropyArgs a) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.logits) + row * a.cols;
  const int64_t target = a.target[row];
  const float picked = target_logit(a, x, target);
  RunningSum exps;
  float plain = 0.0f;
  for (int64_t j = int64_t(threadIdx.x) * kElements; j < a.cols; j += int64_t(blockDim.x) * kElements) {
    const Vector<T, kElements> v = load<kElements>(x + j);
    exps.add<kElements>([&](int e) { return to_float(v.v[e]); });
#pragma unroll
    for (int e = 0; e < kElements; ++e) plain += to_float(v.v[e]);
  }
  exps.join<1024>();
  if (a.smoothing > 0.0f) plain = reduce<Sum, 1024>(plain);
  double lse = 0.0;
  if (threadIdx.x == 0) {
    if (target != a.ignore_index) lse = log_sum_exp(finite_or_zero(exps.top), exps.sum);
    a.lse[row] = lse;
    a.losses[row] = row_loss(a, lse, target, picked, plain);
  }
  if (a.dlogits == nullptr) return;
  const RowGradient gradient(a, of_first<1024>(lse), target, 1.0f);
  write_gradient<T, kElements>(a, x, static_cast<T*>(a.dlogits) + row * a.cols, gradient);
}

// The gradient from the forward's log-sum-exps; `grad` is one number for all rows, or one a row.
template <class T, int kElements>
__global__ void __launch_bounds__(1024) cross_entropy_backward_kernel(CrossEntropyArgs a) {
  const int64_t row = blockIdx.x;
  const RowGradient gradient(a, a.lse[row], a.target[row], a.grad[a.grad_rows ? row : 0]);
  write_gradient<T, kElements>(a, static_cast<const T*>(a.logits) + row * a.cols,
                               static_cast<T*>(a.dlogits) + row * a.cols, gradient);
}

// Multiplies a matrix by one number, or one a row; where that is 1 nothing is read.
template <class T, int kElements>
__global__ void __launch_bounds__(1024) scale_rows_kernel(CrossEntropyArgs a) {
  const int64_t row = blockIdx.x;
  const float factor = a.grad[a.grad_rows ? row : 0];
  if (factor == 1.0f) return;
  T* x = static_cast<T*>(a.dlogits) + row * a.cols;
  for (int64_t j = int64_t(threadIdx.x) * kElements; j < a.cols; j += int64_t(blockDim.x) * kElements) {
    Vector<T, kElements> v = load<kElements>(x + j);
#pragma unroll
    for (int e = 0; e < kElements; ++e) v.v[e] = from_float<T>(to_float(v.v[e]) * factor);
    store<kElements>(x + j, v);
  }
}

}  // namespace fastgpt::cuda
