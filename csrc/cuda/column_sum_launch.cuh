// The launch of column_sum.cuh, for the ops whose gradients are sums over rows.
#pragma once

#include "cuda/column_sum.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {

template <class P>
void launch_column_sum(const ColumnSumArgs<P>& a, cudaStream_t stream) {
  const unsigned blocks = blocks_of((a.cols + kSumColumns - 1) / kSumColumns);
  launch(column_sum_kernel<P>, dim3(blocks, static_cast<unsigned>(a.matrices)), dim3(kSumColumns * kSumRows), 0, stream,
         a);
}

}  // namespace fastgpt::cuda
