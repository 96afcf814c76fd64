// LayerNorm and RMSNorm, with or without a residual before them, and their gradients; in fp32.
//
//   s = x + residual, rounded to the result's type;  y = (s - mean) rstd weight + bias   (mean 0 for RMSNorm)
//   h = (s - mean) rstd,  g = grad weight,  ds = rstd (g - mean g - h mean(g h)) + grad_sum   (no `mean g` for RMSNorm)
//
// The row kernels keep a row in registers and read each element once; rows that are too wide or not aligned are read
// again from the caches. The parameters' gradients are sums over rows: each block of the backward walks its rows with
// its columns' sums in registers and leaves them for column_sum.cuh.
#pragma once

#include "cuda/kernels.cuh"
#include "cuda/row.cuh"

namespace fastgpt::cuda {

// The floats at x: of the type Q, as many as one 16-byte access of another type has.
template <class Q, int N>
__device__ __forceinline__ Vector<float, N> floats(const Q* x) {
  const Vector<Q, N> raw = load<N>(x);
  Vector<float, N> out;
#pragma unroll
  for (int e = 0; e < N; ++e) out.v[e] = to_float(raw.v[e]);
  return out;
}

// X: of x, T: of the residual, the sum and the result, P: of weight and bias.
template <class X, class T, class P, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads == 32 ? 128 : kThreads) norm_row_kernel(NormArgs a) {
  using R = Row<T, kThreads, kVectors>;
  constexpr int kN = R::kElements;
  const int64_t row = row_of_thread<kThreads>();
  if (row >= a.rows) return;  // whole warps
  const int cols = static_cast<int>(a.cols);
  const X* x = static_cast<const X*>(a.x) + row * a.cols;
  const T* residual = static_cast<const T*>(a.residual) + row * a.cols;
  const P *weight = static_cast<const P*>(a.weight), *bias = static_cast<const P*>(a.bias);
  R s;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = R::first(v);
    if (column >= cols) continue;
    const Vector<float, kN> left = floats<X, kN>(x + column);
    if (a.residual != nullptr) {
      const Vector<float, kN> right = floats<T, kN>(residual + column);
#pragma unroll
      for (int e = 0; e < kN; ++e) s.raw[v].v[e] = from_float<T>(left.v[e] + right.v[e]);
      store<kN>(static_cast<T*>(a.summed) + row * a.cols + column, s.raw[v]);
    } else {
#pragma unroll
      for (int e = 0; e < kN; ++e) s.raw[v].v[e] = from_float<T>(left.v[e]);
    }
  }
  float mean = 0.0f;
  if (a.mean != nullptr) {
    s.each(cols, [&](int, float v) { mean += v; });
    mean = reduce<Sum, kThreads>(mean) / static_cast<float>(cols);
    s.unpacked();
  }
  float square = 0.0f;
  s.each(cols, [&](int, float v) { square += (v - mean) * (v - mean); });
  square = reduce<Sum, kThreads>(square);
  s.unpacked();
  const float rstd = 1.0f / sqrtf(square / static_cast<float>(cols) + a.eps);
  if (threadIdx.x % kThreads == 0) {
    if (a.mean != nullptr) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = R::first(v);
    if (column >= cols) continue;
    Vector<float, kN> y;
#pragma unroll
    for (int e = 0; e < kN; ++e) y.v[e] = (to_float(s.raw[v].v[e]) - mean) * rstd;
    if (weight != nullptr) {
      const Vector<float, kN> w = floats<P, kN>(weight + column);
#pragma unroll
      for (int e = 0; e < kN; ++e) y.v[e] *= w.v[e];
    }
    if (bias != nullptr) {
      const Vector<float, kN> b = floats<P, kN>(bias + column);
#pragma unroll
      for (int e = 0; e < kN; ++e) y.v[e] += b.v[e];
    }
#pragma unroll
    for (int e = 0; e < kN; ++e) s.raw[v].v[e] = from_float<T>(y.v[e]);
  }
  s.write(static_cast<T*>(a.y) + row * a.cols, cols);
}

// A block a row of any width and alignment.
template <class X, class T, class P>
__global__ void __launch_bounds__(1024) norm_pass_kernel(NormArgs a) {
  const int64_t row = blockIdx.x;
  const int cols = static_cast<int>(a.cols);
  const X* x = static_cast<const X*>(a.x) + row * a.cols;
  const T* residual = static_cast<const T*>(a.residual) + row * a.cols;
  const P *weight = static_cast<const P*>(a.weight), *bias = static_cast<const P*>(a.bias);
  T *y = static_cast<T*>(a.y) + row * a.cols, *summed = static_cast<T*>(a.summed) + row * a.cols;
  const auto value = [&](int j) {  // each thread reads only the sums that it wrote
    return a.residual != nullptr ? to_float(summed[j]) : to_float(x[j]);
  };
  float mean = 0.0f;
  for (int j = threadIdx.x; j < cols; j += blockDim.x) {
    if (a.residual != nullptr) summed[j] = from_float<T>(to_float(x[j]) + to_float(residual[j]));
    mean += value(j);
  }
  mean = a.mean != nullptr ? reduce<Sum, 1024>(mean) / static_cast<float>(cols) : 0.0f;
  float square = 0.0f;
  for (int j = threadIdx.x; j < cols; j += blockDim.x) square += (value(j) - mean) * (value(j) - mean);
  square = reduce<Sum, 1024>(square);
  const float rstd = 1.0f / sqrtf(square / static_cast<float>(cols) + a.eps);
  if (threadIdx.x == 0) {
    if (a.mean != nullptr) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
  for (int j = threadIdx.x; j < cols; j += blockDim.x) {
    float v = (value(j) - mean) * rstd;
    if (weight != nullptr) v *= to_float(weight[j]);
    if (bias != nullptr) v += to_float(bias[j]);
    y[j] = from_float<T>(v);
  }
}

// gridDim.x blocks share the rows; block b leaves its columns' sums in parts[b], where parts are asked for.
template <class T, class P, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads) norm_backward_row_kernel(NormBackwardArgs a) {
  using R = Row<T, kThreads, kVectors>;
  constexpr int kN = R::kElements;
  const int cols = static_cast<int>(a.cols);
  const P* weight = static_cast<const P*>(a.weight);
  const bool layer = a.mean != nullptr;
  float dweight[kVectors][kN], dbias[kVectors][kN];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < kN; ++e) dweight[v][e] = dbias[v][e] = 0.0f;
  }
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const float mean = layer ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    R grad, s;
    grad.read(static_cast<const T*>(a.grad) + row * a.cols, cols);
    s.read(static_cast<const T*>(a.s) + row * a.cols, cols);
    Pair sums = {0.0f, 0.0f};  // of g and of g h
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = R::first(v);
      if (column >= cols) continue;
      Vector<float, kN> w;
      if (weight != nullptr) w = floats<P, kN>(weight + column);
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        const float dy = to_float(grad.raw[v].v[e]), h = (to_float(s.raw[v].v[e]) - mean) * rstd;
        const float g = weight != nullptr ? dy * w.v[e] : dy;
        sums.x += g;
        sums.y += g * h;
        dweight[v][e] += dy * h;
        dbias[v][e] += dy;
      }
    }
    sums = reduce_pair<kThreads>(sums);
    grad.unpacked();
    s.unpacked();
    const float mean_g = layer ? sums.x / static_cast<float>(cols) : 0.0f;
    const float mean_gh = sums.y / static_cast<float>(cols);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = R::first(v);
      if (column >= cols) continue;
      Vector<float, kN> dx;
      {
        Vector<float, kN> w;
        if (weight != nullptr) w = floats<P, kN>(weight + column);
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          const float dy = to_float(grad.raw[v].v[e]), h = (to_float(s.raw[v].v[e]) - mean) * rstd;
          dx.v[e] = rstd * ((weight != nullptr ? dy * w.v[e] : dy) - mean_g - h * mean_gh);
        }
      }
      if (a.grad_sum != nullptr) {
        const Vector<float, kN> more = floats<T, kN>(static_cast<const T*>(a.grad_sum) + row * a.cols + column);
#pragma unroll
        for (int e = 0; e < kN; ++e) dx.v[e] += more.v[e];
      }
      Vector<T, kN> out;
      Vector<bf16, kN> half;
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        out.v[e] = from_float<T>(dx.v[e]);
        half.v[e] = from_float<bf16>(dx.v[e]);
      }
      store<kN>(static_cast<T*>(a.dx) + row * a.cols + column, out);
      if (a.dx_half != nullptr) store<kN>(static_cast<bf16*>(a.dx_half) + row * a.cols + column, half);
    }
  }
  if (a.parts == nullptr) return;
  float* part = a.parts + int64_t(blockIdx.x) * (layer ? 2 : 1) * a.cols;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = R::first(v);
    if (column >= cols) continue;
#pragma unroll
    for (int e = 0; e < kN; ++e) part[column + e] = dweight[v][e];
    if (!layer) continue;
#pragma unroll
    for (int e = 0; e < kN; ++e) part[cols + column + e] = dbias[v][e];
  }
}

// dx of a row of any width and alignment, a block each.
template <class T, class P>
__global__ void __launch_bounds__(1024) norm_backward_pass_kernel(NormBackwardArgs a) {
  const int64_t row = blockIdx.x;
  const int cols = static_cast<int>(a.cols);
  const P* weight = static_cast<const P*>(a.weight);
  const T *grad = static_cast<const T*>(a.grad) + row * a.cols, *s = static_cast<const T*>(a.s) + row * a.cols;
  const float mean = a.mean != nullptr ? a.mean[row] : 0.0f, rstd = a.rstd[row];
  const auto g = [&](int j) { return to_float(grad[j]) * (weight != nullptr ? to_float(weight[j]) : 1.0f); };
  Pair sums = {0.0f, 0.0f};
  for (int j = threadIdx.x; j < cols; j += blockDim.x) {
    sums.x += g(j);
    sums.y += g(j) * (to_float(s[j]) - mean) * rstd;
  }
  sums = reduce_pair<1024>(sums);
  const float mean_g = a.mean != nullptr ? sums.x / static_cast<float>(cols) : 0.0f;
  const float mean_gh = sums.y / static_cast<float>(cols);
  for (int j = threadIdx.x; j < cols; j += blockDim.x) {
    float dx = rstd * (g(j) - mean_g - (to_float(s[j]) - mean) * rstd * mean_gh);
    if (a.grad_sum != nullptr) dx += to_float(static_cast<const T*>(a.grad_sum)[row * a.cols + j]);
    static_cast<T*>(a.dx)[row * a.cols + j] = from_float<T>(dx);
    if (a.dx_half != nullptr) static_cast<bf16*>(a.dx_half)[row * a.cols + j] = from_float<bf16>(dx);
  }
}

// The parts of the parameters' gradients where the row kernel did not leave them: a thread a column, gridDim.y parts.
template <class T>
__global__ void __launch_bounds__(128) norm_parts_kernel(NormBackwardArgs a) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= a.cols) return;
  const bool layer = a.mean != nullptr;
  float dweight = 0.0f, dbias = 0.0f;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const float dy = to_float(static_cast<const T*>(a.grad)[row * a.cols + column]);
    const float s = to_float(static_cast<const T*>(a.s)[row * a.cols + column]);
    dweight += dy * ((s - (layer ? a.mean[row] : 0.0f)) * a.rstd[row]);
    dbias += dy;
  }
  float* part = a.parts + int64_t(blockIdx.y) * (layer ? 2 : 1) * a.cols;
  part[column] = dweight;
  if (layer) part[a.cols + column] = dbias;
}

}  // namespace fastgpt::cuda
