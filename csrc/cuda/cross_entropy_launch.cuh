// The choice of a cross-entropy kernel by width and alignment, shared by cross_entropy.cu and the emulation's tests.
#pragma once

#include "cuda/cross_entropy.cuh"
#include "cuda/row_launch.cuh"

namespace fastgpt::cuda {

inline void launch_count_targets(const CrossEntropyArgs& a, cudaStream_t stream) {
  launch(count_targets_kernel, dim3(1), dim3(kCountThreads), 0, stream, a);
}

template <class T>
void launch_cross_entropy(const CrossEntropyArgs& a, cudaStream_t stream) {
  if (a.rows > 0) {
    const auto start = [&]<int kThreads, int kVectors>(const Row<T, kThreads, kVectors>& row) {
      launch_rows(cross_entropy_row_kernel<T, kThreads, kVectors>, row, a, a.rows, stream);
    };
    constexpr int kN = kWide<T>;
    const bool wide = aligned({a.logits, a.dlogits}, a.cols * int64_t(sizeof(T)));
    if (!wide) {
      launch(cross_entropy_pass_kernel<T, 1>, dim3(blocks_of(a.rows)), dim3(pass_threads(a.cols)), 0, stream, a);
    } else if (!with_row<Row<T, 32, 4>, Row<T, 256, 4>, Row<T, 1024, 7>>(a.cols, start)) {
      launch(cross_entropy_pass_kernel<T, kN>, dim3(blocks_of(a.rows)), dim3(1024), 0, stream, a);
    }
  }
  if (a.loss != nullptr) launch(total_loss_kernel, dim3(1), dim3(kCountThreads), 0, stream, a);
}

template <class T>
void launch_cross_entropy_backward(const CrossEntropyArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const bool wide = aligned({a.logits, a.dlogits}, a.cols * int64_t(sizeof(T)));
  launch(wide ? cross_entropy_backward_kernel<T, kWide<T>> : cross_entropy_backward_kernel<T, 1>,
         dim3(blocks_of(a.rows)), dim3(pass_threads(wide ? a.cols / kWide<T> : a.cols)), 0, stream, a);
}

template <class T>
void launch_scale_rows(const CrossEntropyArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const bool wide = aligned({a.dlogits}, a.cols * int64_t(sizeof(T)));
  launch(wide ? scale_rows_kernel<T, kWide<T>> : scale_rows_kernel<T, 1>, dim3(blocks_of(a.rows)),
         dim3(pass_threads(wide ? a.cols / kWide<T> : a.cols)), 0, stream, a);
}

}  // namespace fastgpt::cuda
