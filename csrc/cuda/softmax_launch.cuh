// The choice of a softmax kernel by the row's width and alignment, shared by softmax.cu and the emulation's tests.
#pragma once

#include "cuda/row_launch.cuh"
#include "cuda/softmax.cuh"

namespace fastgpt::cuda {

template <class T>
void launch_softmax(const SoftmaxArgs& a, bool backward, cudaStream_t stream) {
  const int64_t rows = a.batch * a.heads * a.queries;
  if (rows == 0 || a.cols == 0) return;
  const bool vectors = aligned({a.x, a.y, backward ? a.y_in : a.x}, a.cols * int64_t(sizeof(T)));
  if (vectors) {
    const bool plain = a.mask == nullptr && !a.causal;
    const auto forward_row = [&]<int kThreads, int kVectors>(const Row<T, kThreads, kVectors>& row) {
      launch_rows(
          plain ? softmax_row_kernel<T, kThreads, kVectors, true> : softmax_row_kernel<T, kThreads, kVectors, false>,
          row, a, rows, stream);
    };
    // One block's registers hold a plain row of 57,344 bf16 columns, but not the mask's addresses besides.
    const auto widest_row = [&]<int kThreads, int kVectors>(const Row<T, kThreads, kVectors>& row) {
      launch_rows(softmax_row_kernel<T, kThreads, kVectors, true>, row, a, rows, stream);
    };
    const auto backward_row = [&]<int kThreads, int kVectors>(const Row<T, kThreads, kVectors>& row) {
      launch_rows(softmax_backward_row_kernel<T, kThreads, kVectors>, row, a, rows, stream);
    };
    if (backward ? with_row<Row<T, 32, 4>, Row<T, 256, 4>, Row<T, 1024, 3>>(a.cols, backward_row)
                 : with_row<Row<T, 32, 4>, Row<T, 256, 4>>(a.cols, forward_row) ||
                       (plain && with_row<Row<T, 1024, 7>>(a.cols, widest_row))) {
      return;
    }
  }
  const auto pass = [&](void (*kernel)(SoftmaxArgs)) {
    launch(kernel, dim3(blocks_of(rows)), dim3(pass_threads(a.cols)), 0, stream, a);
  };
  if (vectors) {
    pass(backward ? softmax_backward_pass_kernel<T, kWide<T>> : softmax_pass_kernel<T, kWide<T>>);
  } else {
    pass(backward ? softmax_backward_pass_kernel<T, 1> : softmax_pass_kernel<T, 1>);
  }
}

}  // namespace fastgpt::cuda
