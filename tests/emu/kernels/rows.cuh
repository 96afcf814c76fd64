// A row softmax for the tests of the emulator itself: static and dynamic shared memory, shuffles, two barriers.
//
// Not a kernel of the package: small, so that each of its lines can be broken and the breakage seen.
#pragma once

#include "cuda/ptx.cuh"

constexpr int kRowThreads = 128;

__device__ __forceinline__ float warp_max(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, bits));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  return x;
}

// y = softmax(x) over each of `rows` rows of `columns` floats, a block a row; the row lies in dynamic shared memory.
__global__ void __launch_bounds__(kRowThreads) row_softmax_kernel(const float* x, float* y, int rows, int columns) {
  extern __shared__ float row[];
  __shared__ float partial[kRowThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x += int64_t(blockIdx.x) * columns;
  y += int64_t(blockIdx.x) * columns;
  float largest = -INFINITY;
  for (int j = threadIdx.x; j < columns; j += kRowThreads) {
    row[j] = x[j];
    largest = fmaxf(largest, row[j]);
  }
  largest = warp_max(largest);
  if (lane == 0) partial[warp] = largest;
  __syncthreads();  // first
  for (int w = 0; w < kRowThreads / 32; ++w) largest = fmaxf(largest, partial[w]);
  __syncthreads();  // second: partial is used again
  // From here on a thread reads what its neighbour wrote.
  float sum = 0.0f;
  for (int j = threadIdx.x; j < columns; j += kRowThreads) {
    const int other = columns - 1 - j;
    sum += expf(row[other] - largest);
  }
  sum = warp_sum(sum);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();  // third
  sum = 0.0f;
  for (int w = 0; w < kRowThreads / 32; ++w) sum += partial[w];
  for (int j = threadIdx.x; j < columns; j += kRowThreads) {
    y[j] = expf(row[j] - largest) / sum;
  }
}

// y = x by way of cp.async through shared memory, two stages of 16 bytes a thread, each read by a neighbour.
__global__ void staged_copy_kernel(const uint4* x, uint4* y, int vectors) {
  extern __shared__ uint4 stage[];
  const int threads = blockDim.x, me = threadIdx.x, other = threads - 1 - me;
  const uint32_t base = fastgpt::ptx::shared_address(stage);
  fastgpt::ptx::cp_async_16(base + 16 * me, x + min(me, vectors - 1), me < vectors);
  fastgpt::ptx::cp_async_commit();
  for (int i = 0; i < vectors; i += threads) {
    const int next = i + threads + me, slot = (i / threads) % 2;
    fastgpt::ptx::cp_async_16(base + 16 * ((slot ^ 1) * threads + me), x + min(next, vectors - 1), next < vectors);
    fastgpt::ptx::cp_async_commit();
    fastgpt::ptx::cp_async_wait<1>();
    __syncthreads();  // arrived
    if (i + other < vectors) y[i + other] = stage[slot * threads + other];
    __syncthreads();  // free again
  }
  fastgpt::ptx::cp_async_wait<0>();
}
