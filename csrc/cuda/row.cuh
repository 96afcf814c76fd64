// What kernels over rows share: a row in the registers of a warp or a block, read once, and sums over those threads.
//
// Row<T, kThreads, kVectors> keeps kVectors accesses of 16 bytes a thread as they are in memory, so a bf16 row of 8,192
// columns costs a block of 256 threads 16 registers each. A row that is too wide or not aligned is read again from the
// caches instead, element by element.
#pragma once

#include <cmath>

#include "cuda/dtype.cuh"
#include "cuda/ptx.cuh"

namespace fastgpt {

struct Sum {
  static __device__ __forceinline__ float none() { return 0.0f; }
  static __device__ __forceinline__ float join(float a, float b) { return a + b; }
};
struct Max {
  static __device__ __forceinline__ float none() { return -INFINITY; }
  static __device__ __forceinline__ float join(float a, float b) { return fmaxf(a, b); }
};

// The same value in every thread of a row: those of a warp for kThreads = 32, else of the block (whole warps).
template <class Op, int kThreads>
__device__ __forceinline__ float reduce(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x = Op::join(x, __shfl_xor_sync(0xffffffffu, x, bits));
  if constexpr (kThreads > 32) {
    __shared__ float partial[32];
    const int warps = blockDim.x / 32;
    __syncthreads();  // the last reduction has been read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();  // every warp has written
    x = threadIdx.x % 32 < warps ? partial[threadIdx.x % 32] : Op::none();
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) x = Op::join(x, __shfl_xor_sync(0xffffffffu, x, bits));
  }
  return x;
}

__device__ __forceinline__ float finite_or_zero(float x) { return fabsf(x) < INFINITY ? x : 0.0f; }

// The largest of a row's values so far and the sum of exp(value - largest), in one walk (arXiv 1805.02867, algorithm
// 3). A largest value that is not finite counts as 0 in the sum, so that a row of -inf has the sum 0 and one with inf
// has inf.
struct RunningSum {
  float top = -INFINITY, sum = 0.0f;

  // The next values: f(e) for e below kCount.
  template <int kCount, class F>
  __device__ __forceinline__ void add(const F& f) {
    float larger = top;
#pragma unroll
    for (int e = 0; e < kCount; ++e) larger = fmaxf(larger, f(e));
    const float from = finite_or_zero(larger);
    if (larger != top) sum *= expf(top - larger);
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum += expf(f(e) - from);
    top = larger;
  }
  // Of all threads together, in every thread.
  template <int kThreads>
  __device__ __forceinline__ void join() {
    const float largest = reduce<Max, kThreads>(top);
    if (largest != top) sum *= expf(top - largest);
    sum = reduce<Sum, kThreads>(sum);
    top = largest;
  }
};

struct Pair {
  float x, y;
};

// Two sums at once, for the price of one's barriers.
template <int kThreads>
__device__ __forceinline__ Pair reduce_pair(Pair x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    x.x += __shfl_xor_sync(0xffffffffu, x.x, bits);
    x.y += __shfl_xor_sync(0xffffffffu, x.y, bits);
  }
  if constexpr (kThreads > 32) {
    __shared__ Pair pair_partial[32];
    const int lane = threadIdx.x % 32, pairs = blockDim.x / 32;
    __syncthreads();  // the last pair has been read
    if (lane == 0) pair_partial[threadIdx.x / 32] = x;
    __syncthreads();  // every pair is there
    x = lane < pairs ? pair_partial[lane] : Pair{0.0f, 0.0f};
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
      x.x += __shfl_xor_sync(0xffffffffu, x.x, bits);
      x.y += __shfl_xor_sync(0xffffffffu, x.y, bits);
    }
  }
  return x;
}

// A row of at most kCapacity columns in registers.
template <class T, int kThreads, int kVectors>
struct Row {
  static constexpr int kElements = kWide<T>;
  static constexpr int kCapacity = kThreads * kVectors * kElements;
  Vector<T, kElements> raw[kVectors];

  __device__ __forceinline__ void read(const T* x, int cols) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = first(v);
      if (column < cols) raw[v] = load<kElements>(x + column);
    }
  }
  __device__ __forceinline__ void write(T* y, int cols) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = first(v);
      if (column < cols) store<kElements>(y + column, raw[v]);
    }
  }
  // From here on elements are converted again: their floats, kept from an earlier walk, would take twice the registers.
  __device__ __forceinline__ void unpacked() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint32_t* words = reinterpret_cast<uint32_t*>(&raw[v]);
#pragma unroll
      for (int w = 0; w < 4; ++w) ptx::opaque(words[w]);
    }
  }
  // f(column, the element as float) over the thread's elements.
  template <class F>
  __device__ __forceinline__ void each(int cols, const F& f) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (first(v) >= cols) continue;
#pragma unroll
      for (int e = 0; e < kElements; ++e) f(first(v) + e, to_float(raw[v].v[e]));
    }
  }
  // Replaces each element by f(column, the element, the element of `other`).
  template <class F>
  __device__ __forceinline__ void replace(const Row& other, int cols, const F& f) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (first(v) >= cols) continue;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        raw[v].v[e] = from_float<T>(f(first(v) + e, to_float(raw[v].v[e]), to_float(other.raw[v].v[e])));
      }
    }
  }

  // The first column of the thread's vector v.
  static __device__ __forceinline__ int first(int v) {
    return (v * kThreads + static_cast<int>(threadIdx.x % kThreads)) * kElements;
  }
};

// The row a thread works on: a warp each for kThreads = 32, else a block each.
template <int kThreads>
__device__ __forceinline__ int64_t row_of_thread() {
  if constexpr (kThreads == 32) return int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  return blockIdx.x;
}

}  // namespace fastgpt
