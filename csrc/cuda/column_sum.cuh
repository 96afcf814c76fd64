// Sums over rows without atomics: each block of a first kernel leaves its part of every column's sum, and this kernel
// adds the parts in a fixed order, so that the same input gives the same bits.
#pragma once

#include "cuda/dtype.cuh"

namespace fastgpt::cuda {

constexpr int kSumColumns = 32, kSumRows = 8;

// parts: (count, matrices, cols) fp32; the sum of matrix m goes to out[m], cols elements of P.
template <class P>
struct ColumnSumArgs {
  const float* parts;
  int64_t count, matrices, cols;
  P* out[2];
};

template <class P>
__global__ void __launch_bounds__(kSumColumns* kSumRows) column_sum_kernel(ColumnSumArgs<P> a) {
  __shared__ float partial[kSumRows][kSumColumns];
  const int lane = threadIdx.x % kSumColumns, row = threadIdx.x / kSumColumns;
  const int64_t column = int64_t(blockIdx.x) * kSumColumns + lane, matrix = blockIdx.y;
  float sum = 0.0f;
  if (column < a.cols) {
#pragma unroll 8
    for (int64_t part = row; part < a.count; part += kSumRows) {
      sum += a.parts[(part * a.matrices + matrix) * a.cols + column];
    }
  }
  partial[row][lane] = sum;
  __syncthreads();  // every row of threads has written
  if (row > 0 || column >= a.cols) return;
  for (int other = 1; other < kSumRows; ++other) sum += partial[other][lane];
  a.out[matrix][column] = from_float<P>(sum);
}

}  // namespace fastgpt::cuda
