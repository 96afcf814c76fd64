// The launchers of attention_sm80.cuh and its backward, shared by the .cu files and the emulation's tests.
#pragma once

#include "cuda/attention_launch.cuh"
#include "cuda/attention_sm80.cuh"
#include "cuda/attention_sm80_backward.cuh"

namespace fastgpt::attention {

template <class T, int kDim>
void launch_attention_fwd_sm80(const Params& p, cudaStream_t stream) {
  using Shape = Sm80Forward<kDim>;
  launch_large(attention_fwd_sm80_kernel<T, kDim>,
               dim3((p.queries + Shape::BLOCK_M - 1) / Shape::BLOCK_M, p.heads, p.batch), dim3(Shape::kThreads),
               Shape::kSharedBytes, stream, p);
}

// Raises std::invalid_argument for what the kernel does not cover, before anything is launched.
template <class T>
void attention_fwd_sm80(const Params& p, cudaStream_t stream) {
  check_shape(p);
  check_rows("query", p.query, p.query_stride);
  check_rows("key", p.key, p.key_stride);
  check_rows("value", p.value, p.value_stride);
  check_rows("out", p.out, p.out_stride);
  switch (p.dim) {
    case 32:
      return launch_attention_fwd_sm80<T, 32>(p, stream);
    case 64:
      return launch_attention_fwd_sm80<T, 64>(p, stream);
    case 96:
      return launch_attention_fwd_sm80<T, 96>(p, stream);
    case 128:
      return launch_attention_fwd_sm80<T, 128>(p, stream);
    default:
      throw std::invalid_argument("head_dim: expected 32, 64, 96 or 128, got " + std::to_string(p.dim));
  }
}

template <class T, int kDim>
void launch_attention_bwd_sm80(const Params& p, cudaStream_t stream) {
  using Shape = Sm80Backward<kDim>;
  constexpr int kRows = Shape::BLOCK_ROWS;
  launch(attention_delta_kernel<T, 80>, dim3((p.queries + 3) / 4, p.heads, p.batch), dim3(128), 0, stream, p);
  launch_large(attention_bwd_kv_sm80_kernel<T, kDim>, dim3((p.keys + kRows - 1) / kRows, p.kv_heads, p.batch),
               dim3(Shape::kThreads), Shape::kSharedBytes, stream, p);
  launch_large(attention_bwd_q_sm80_kernel<T, kDim>, dim3((p.queries + kRows - 1) / kRows, p.heads, p.batch),
               dim3(Shape::kThreads), Shape::kSharedBytes, stream, p);
}

// Raises std::invalid_argument for what the kernels do not cover, before anything is launched.
template <class T>
void attention_bwd_sm80(const Params& p, cudaStream_t stream) {
  check_backward(p);
  switch (p.dim) {
    case 32:
      return launch_attention_bwd_sm80<T, 32>(p, stream);
    case 64:
      return launch_attention_bwd_sm80<T, 64>(p, stream);
    case 96:
      return launch_attention_bwd_sm80<T, 96>(p, stream);
    case 128:
      return launch_attention_bwd_sm80<T, 128>(p, stream);
    default:
      throw std::invalid_argument("head_dim: expected 32, 64, 96 or 128, got " + std::to_string(p.dim));
  }
}

}  // namespace fastgpt::attention
