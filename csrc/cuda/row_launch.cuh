// Launches of kernels over rows, shared by the ops that have them and by the emulation's tests.
#pragma once

#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"
#include "cuda/row.cuh"

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

}  // namespace fastgpt::cuda
