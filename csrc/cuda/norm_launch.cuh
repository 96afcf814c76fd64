// The choice of a norm's kernel by types, width and alignment, shared by norm.cu and the emulation's tests.
#pragma once

#include <type_traits>

#include "cuda/column_sum_launch.cuh"
#include "cuda/norm.cuh"
#include "cuda/row_launch.cuh"

namespace fastgpt::cuda {

// Whether all these addresses allow the accesses that go beside a 16-byte one: at most eight floats.
inline bool aligned_32(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 32 == 0; });
}

template <class X, class T, class P>
void launch_norm(const NormArgs& a, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return;
  if (a.cols % kWide<T> == 0 && aligned({a.x, a.residual, a.summed, a.y}, 0) && aligned_32({a.weight, a.bias})) {
    const auto start = [&]<int kThreads, int kVectors>(const Row<T, kThreads, kVectors>& row) {
      launch_rows(norm_row_kernel<X, T, P, kThreads, kVectors>, row, a, a.rows, stream);
    };
    if (with_row<Row<T, 32, 4>, Row<T, 256, 4>, Row<T, 1024, 2>>(a.cols, start)) return;
  }
  launch(norm_pass_kernel<X, T, P>, dim3(blocks_of(a.rows)), dim3(pass_threads(a.cols)), 0, stream, a);
}

template <class T, class P>
void launch_norm_backward(const NormBackwardArgs& a, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return;
  const unsigned parts = blocks_of(a.part_count);
  bool fused = a.cols % kWide<T> == 0 && aligned({a.grad, a.grad_sum, a.s, a.dx, a.dx_half}, 0);
  fused = fused && aligned_32({a.weight});
  using Widest = std::conditional_t<sizeof(T) == 4, Row<T, 1024, 2>, Row<T, 512, 3>>;  // wider ones spill
  fused = fused &&
          with_row<Row<T, 128, 1>, Row<T, 256, 1>, Row<T, 512, 2>, Widest>(
              a.cols, [&]<int kThreads, int kVectors>(const Row<T, kThreads, kVectors>&) {
                launch(norm_backward_row_kernel<T, P, kThreads, kVectors>, dim3(parts), dim3(kThreads), 0, stream, a);
              });
  if (!fused) {
    launch(norm_backward_pass_kernel<T, P>, dim3(blocks_of(a.rows)), dim3(pass_threads(a.cols)), 0, stream, a);
    if (a.parts != nullptr) {
      launch(norm_parts_kernel<T>, dim3(blocks_of((a.cols + 127) / 128), parts), dim3(128), 0, stream, a);
    }
  }
  if (a.parts == nullptr) return;
  const int64_t matrices = a.mean != nullptr ? 2 : 1;
  launch_column_sum<P>(
      {a.parts, a.part_count, matrices, a.cols, {static_cast<P*>(a.dweight), static_cast<P*>(a.dbias)}}, stream);
}

inline void launch_norm(Type x_type, Type type, Type param_type, const NormArgs& a, cudaStream_t stream) {
  with_param_type(type, param_type, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    if (x_type == type) return launch_norm<T, T, P>(a, stream);
    if constexpr (std::is_same_v<T, float>) {
      if (x_type == Type::kBFloat16) return launch_norm<bf16, float, P>(a, stream);
      if (x_type == Type::kFloat16) return launch_norm<f16, float, P>(a, stream);
    }
    throw std::invalid_argument("norm: the sum has x's type or float32");
  });
}

inline void launch_norm_backward(Type type, Type param_type, const NormBackwardArgs& a, cudaStream_t stream) {
  with_param_type(type, param_type, [&](auto t, auto p) { launch_norm_backward<decltype(t), decltype(p)>(a, stream); });
}

}  // namespace fastgpt::cuda
