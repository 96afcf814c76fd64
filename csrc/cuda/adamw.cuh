// AdamW (arXiv 1711.05101, algorithm 2) of all parameters in one launch, and the norm of all gradients.
//
//   g = grad grad_scale,  m += (1 - b1) (g - m),  v = b2 v + (1 - b2) g^2
//   p = p (1 - lr decay) - lr / (1 - b1^t) m / (sqrt v / sqrt(1 - b2^t) + eps)
//
// A block takes a chunk of one tensor, found by bisection, so that a model of many small tensors is one launch. Each
// number is read and written once; the gradient's zero and the copy in a half type leave with the parameter.
#pragma once

#include "cuda/dtype.cuh"
#include "cuda/kernels.cuh"

namespace fastgpt::cuda {

constexpr int kListThreads = 256;

// The tensor that a chunk belongs to.
__device__ __forceinline__ int64_t tensor_of(const TensorList& list, int64_t chunk) {
  int64_t low = 0, high = list.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (list.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <class T>
__device__ __forceinline__ T* address(const int64_t* table, int64_t tensor) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(table[tensor]));
}

template <class S, int kElements>
__device__ __forceinline__ void adamw_range(const AdamwArgs& a, int64_t tensor, int64_t begin, int64_t end) {
  float *params = address<float>(a.params, tensor), *grads = address<float>(a.grads, tensor);
  float *exp_avgs = address<float>(a.exp_avgs, tensor), *exp_avg_sqs = address<float>(a.exp_avg_sqs, tensor);
  S* shadows = a.shadows != nullptr ? address<S>(a.shadows, tensor) : nullptr;
  const float decay = a.decays[tensor];
  for (int64_t i = begin + int64_t(threadIdx.x) * kElements; i < end; i += int64_t(blockDim.x) * kElements) {
    Vector<float, kElements> p = load<kElements>(params + i), g = load<kElements>(grads + i);
    Vector<float, kElements> m = load<kElements>(exp_avgs + i), v = load<kElements>(exp_avg_sqs + i);
    Vector<S, kElements> shadow;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float grad = g.v[e] * a.grad_scale;
      m.v[e] += (1.0f - a.beta1) * (grad - m.v[e]);
      v.v[e] = a.beta2 * v.v[e] + (1.0f - a.beta2) * grad * grad;
      p.v[e] = p.v[e] * decay - a.step_size * m.v[e] / (sqrtf(v.v[e]) / a.root_correction + a.eps);
      shadow.v[e] = from_float<S>(p.v[e]);
      g.v[e] = 0.0f;
    }
    store<kElements>(params + i, p);
    store<kElements>(exp_avgs + i, m);
    store<kElements>(exp_avg_sqs + i, v);
    if (a.zero_grads) store<kElements>(grads + i, g);
    if (shadows != nullptr) store<kElements>(shadows + i, shadow);
  }
}

// Whether a tensor's addresses in these tables are all multiples of 16 bytes.
__device__ __forceinline__ bool all_aligned(const int64_t* const* tables, int count, int64_t tensor) {
  bool all = true;
  for (int t = 0; t < count; ++t) all = all && (tables[t] == nullptr || tables[t][tensor] % 16 == 0);
  return all;
}

// S: of the shadows.
template <class S>
__global__ void __launch_bounds__(kListThreads, 2) adamw_kernel(AdamwArgs a) {
  const int64_t tensor = tensor_of(a.list, blockIdx.x);
  const int64_t begin = (blockIdx.x - a.list.first_chunk[tensor]) * kChunk, size = a.list.sizes[tensor];
  const int64_t end = begin + kChunk < size ? begin + kChunk : size;
  const int64_t* const tables[] = {a.params, a.grads, a.exp_avgs, a.exp_avg_sqs, a.shadows};
  const int64_t wide = all_aligned(tables, 5, tensor) ? begin + (end - begin) / 4 * 4 : begin;
  adamw_range<S, 4>(a, tensor, begin, wide);
  adamw_range<S, 1>(a, tensor, wide, end);
}

// The sum of x over a block, in a fixed order; for the first thread only.
__device__ __forceinline__ double list_sum(double x) {
  __shared__ double sums[kListThreads / 32];
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();  // every warp's sum is there
  x = 0.0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kListThreads / 32; ++warp) x += sums[warp];
  }
  return x;
}

template <class T, int kElements>
__device__ __forceinline__ double squares(const T* x, int64_t begin, int64_t end) {
  double sum = 0.0;
  for (int64_t i = begin + int64_t(threadIdx.x) * kElements; i < end; i += int64_t(blockDim.x) * kElements) {
    const Vector<T, kElements> v = load<kElements>(x + i);
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum += static_cast<double>(to_float(v.v[e])) * to_float(v.v[e]);
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kListThreads) grad_squares_kernel(GradNormArgs a) {
  const int64_t tensor = tensor_of(a.list, blockIdx.x);
  const int64_t begin = (blockIdx.x - a.list.first_chunk[tensor]) * kChunk, size = a.list.sizes[tensor];
  const int64_t end = begin + kChunk < size ? begin + kChunk : size;
  const T* grad = address<const T>(a.grads, tensor);
  constexpr int kN = kWide<T>;
  const int64_t wide = a.grads[tensor] % 16 == 0 ? begin + (end - begin) / kN * kN : begin;
  const double sum = list_sum(squares<T, kN>(grad, begin, wide) + squares<T, 1>(grad, wide, end));
  if (threadIdx.x == 0) a.parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kListThreads) grad_norm_kernel(GradNormArgs a) {
  double sum = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < a.list.chunks; chunk += blockDim.x) sum += a.parts[chunk];
  sum = list_sum(sum);
  if (threadIdx.x == 0) *a.norm = sqrt(sum);
}

}  // namespace fastgpt::cuda
