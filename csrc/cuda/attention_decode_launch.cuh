// The choice of a decode kernel, shared by attention_decode.cu and the emulation's tests.
#pragma once

#include "cuda/attention_decode.cuh"
#include "cuda/attention_launch.cuh"
#include "cuda/dispatch.cuh"

namespace fastgpt::attention {

template <class T, int kDim, int kRows>
void launch_attention_decode(const DecodeParams& d, cudaStream_t stream) {
  const Params& p = d.attention;
  const int64_t rows = static_cast<int64_t>(p.heads / p.kv_heads) * p.queries, chunks = (rows + kRows - 1) / kRows;
  const int64_t all_rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
  if (chunks * p.kv_heads > 65535) throw std::invalid_argument("attention: too many queries for the decode kernel");
  launch(attention_decode_kernel<T, kDim, kRows>, dim3(d.splits, static_cast<unsigned>(chunks * p.kv_heads), p.batch),
         dim3(kDecodeThreads), 0, stream, d);
  if (d.splits == 1) return;
  launch(attention_decode_merge_kernel<T>, dim3(cuda::blocks_of((all_rows + kDecodeWarps - 1) / kDecodeWarps)),
         dim3(kDecodeThreads), 0, stream, d);
}

// Raises std::invalid_argument for what the kernels do not cover, before anything is launched.
template <class T>
void attention_decode(const DecodeParams& d, cudaStream_t stream) {
  const Params& p = d.attention;
  check_shape(p);
  check_rows("query", p.query, p.query_stride);
  check_rows("key", p.key, p.key_stride);
  check_rows("value", p.value, p.value_stride);
  if (d.splits < 1 || d.keys_per_split < 1 || static_cast<int64_t>(d.splits) * d.keys_per_split < p.keys) {
    throw std::invalid_argument("splits: expected parts that cover " + std::to_string(p.keys) + " keys, got " +
                                std::to_string(d.splits) + " of " + std::to_string(d.keys_per_split));
  }
  const auto with_rows = [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const int64_t rows = static_cast<int64_t>(p.heads / p.kv_heads) * p.queries;
    if (rows == 1) return launch_attention_decode<T, kDim, 1>(d, stream);
    return launch_attention_decode<T, kDim, 4>(d, stream);  // eight rows spill
  };
  switch (p.dim) {
    case 32:
      return with_rows(std::integral_constant<int, 32>{});
    case 64:
      return with_rows(std::integral_constant<int, 64>{});
    case 96:
      return with_rows(std::integral_constant<int, 96>{});
    case 128:
      return with_rows(std::integral_constant<int, 128>{});
    default:
      throw std::invalid_argument("head_dim: expected 32, 64, 96 or 128, got " + std::to_string(p.dim));
  }
}

}  // namespace fastgpt::attention
