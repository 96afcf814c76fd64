// The launchers of attention_sm90.cuh and its backward, shared by the .cu files and the emulation's tests.
#pragma once

#include "cuda/attention_launch.cuh"
#include "cuda/attention_sm90.cuh"
#include "cuda/attention_sm90_backward.cuh"
#include "cuda/tensor_map.cuh"

namespace fastgpt::attention {

template <class T, int kDim>
void launch_attention_fwd_sm90(const Params& p, int multiprocessors, cudaStream_t stream) {
  using Shape = Sm90Forward<kDim>;
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  const auto map = [&](const char* name, const void* x, const Strides& s, int length, int heads, int rows) {
    return heads_tensor_map(name, x, kBFloat16, kDim, length, heads, p.batch, s.row, s.head, s.batch, rows);
  };
  const int blocks = (p.queries + Shape::BLOCK_M - 1) / Shape::BLOCK_M, group = p.heads / p.kv_heads;
  const int64_t bytes_of_keys = static_cast<int64_t>(p.keys) * kDim * 4;
  const Schedule schedule = longest_first(blocks, p.heads, p.batch, bytes_of_keys, group);
  const int count = schedule.count();
  launch_large(attention_fwd_sm90_kernel<T, kDim>, dim3(count < multiprocessors ? count : multiprocessors),
               dim3(Shape::kThreads), Shape::kSharedBytes, stream,
               map("query", p.query, p.query_stride, p.queries, p.heads, Shape::BLOCK_M),
               map("key", p.key, p.key_stride, p.keys, p.kv_heads, Shape::BLOCK_N),
               map("value", p.value, p.value_stride, p.keys, p.kv_heads, Shape::BLOCK_N), p, schedule);
}

inline void check_sm90(const Params& p) {
  check_shape(p);
  if (p.queries > kUnlimited || p.keys > kUnlimited) {
    throw std::invalid_argument("attention: at most 2^30 - 1024 queries and keys, got " + std::to_string(p.queries) +
                                " and " + std::to_string(p.keys));
  }
}

// Raises std::invalid_argument for what the kernel does not cover, before anything is launched.
template <class T>
void attention_fwd_sm90(const Params& p, int multiprocessors, cudaStream_t stream) {
  check_sm90(p);
  check_rows("query", p.query, p.query_stride);
  check_rows("key", p.key, p.key_stride);
  check_rows("value", p.value, p.value_stride);
  check_rows("out", p.out, p.out_stride);
  switch (p.dim) {
    case 64:
      return launch_attention_fwd_sm90<T, 64>(p, multiprocessors, stream);
    case 128:
      return launch_attention_fwd_sm90<T, 128>(p, multiprocessors, stream);
    default:
      throw std::invalid_argument("head_dim: expected 64 or 128, got " + std::to_string(p.dim));
  }
}

template <class T, int kDim>
void launch_attention_bwd_sm90(const Params& p, cudaStream_t stream) {
  using Shape = Sm90Backward<kDim>;
  constexpr int kRows = Shape::BLOCK_ROWS, kColumns = Shape::BLOCK_COLUMNS;
  const auto map = [&](const char* name, const void* x, const Strides& s, int length, int heads, int rows) {
    constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
    return heads_tensor_map(name, x, kBFloat16, kDim, length, heads, p.batch, s.row, s.head, s.batch, rows);
  };
  const auto query = [&](int rows) { return map("query", p.query, p.query_stride, p.queries, p.heads, rows); };
  const auto grad = [&](int rows) { return map("grad", p.grad, p.grad_stride, p.queries, p.heads, rows); };
  const auto key = [&](int rows) { return map("key", p.key, p.key_stride, p.keys, p.kv_heads, rows); };
  const auto value = [&](int rows) { return map("value", p.value, p.value_stride, p.keys, p.kv_heads, rows); };
  launch(attention_delta_kernel<T, 90>, dim3((p.queries + 3) / 4, p.heads, p.batch), dim3(128), 0, stream, p);
  launch_large(attention_bwd_sm90_kernel<T, kDim, true>, dim3((p.keys + kRows - 1) / kRows, p.kv_heads, p.batch),
               dim3(Shape::kThreads), Shape::kSharedBytes, stream, key(kRows), value(kRows), query(kColumns),
               grad(kColumns), p);
  launch_large(attention_bwd_sm90_kernel<T, kDim, false>, dim3((p.queries + kRows - 1) / kRows, p.heads, p.batch),
               dim3(Shape::kThreads), Shape::kSharedBytes, stream, query(kRows), grad(kRows), key(kColumns),
               value(kColumns), p);
}

// Raises std::invalid_argument for what the kernels do not cover, before anything is launched.
template <class T>
void attention_bwd_sm90(const Params& p, cudaStream_t stream) {
  check_sm90(p);
  check_backward(p);
  switch (p.dim) {
    case 64:
      return launch_attention_bwd_sm90<T, 64>(p, stream);
    case 128:
      return launch_attention_bwd_sm90<T, 128>(p, stream);
    default:
      throw std::invalid_argument("head_dim: expected 64 or 128, got " + std::to_string(p.dim));
  }
}

}  // namespace fastgpt::attention
