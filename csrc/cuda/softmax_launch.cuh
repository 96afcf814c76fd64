// The choice of a softmax kernel by the row's width and alignment, shared by softmax.cu and the emulation's tests.
#pragma once

#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"

namespace fastgpt::cuda {

// Calls f(a Row type) for the smallest of the given ones that holds `cols` elements; false where none does.
template <class... Rows, class F>
bool with_row(int64_t cols, const F& f) {
  const auto fits = [&](auto row) {
    if (cols > decltype(row)::kCapacity) return false;
    f(row);
    return true;
  };
  return (fits(Rows{}) || ...);
}

template <class T, int kThreads, int kVectors, class Args>
void launch_rows(void (*kernel)(Args), const Row<T, kThreads, kVectors>&, const Args& a, int64_t rows, cudaStream_t s) {
  if constexpr (kThreads == 32) {
    launch(kernel, dim3(blocks_of((rows + 3) / 4)), dim3(128), 0, s, a);
  } else {
    launch(kernel, dim3(blocks_of(rows)), dim3(kThreads), 0, s, a);
  }
}

// Threads of a block that walks a row of `cols` elements.
inline unsigned pass_threads(int64_t cols) {
  return static_cast<unsigned>(std::clamp<int64_t>((cols + 127) / 128 * 32, 32, 1024));
}

template <class T>
void launch_softmax(const SoftmaxArgs& a, bool backward, cudaStream_t stream) {
  const int64_t rows = a.batch * a.heads * a.queries;
  if (rows == 0 || a.cols == 0) return;
  if (aligned({a.x, a.y, backward ? a.y_in : a.x}, a.cols * int64_t(sizeof(T)))) {
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
  launch(backward ? softmax_backward_pass_kernel<T> : softmax_pass_kernel<T>, dim3(blocks_of(rows)),
         dim3(pass_threads(a.cols)), 0, stream, a);
}

}  // namespace fastgpt::cuda
