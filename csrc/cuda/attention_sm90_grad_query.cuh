// dQ of the backward with five products: where its fp32 sums lie, and the kernel that rounds them.
//
// Each step of a block of keys adds a product of 64 queries, D / 2 columns from each of two warpgroups. A warpgroup's
// part goes to memory in the order of its registers: float4 i of thread t at 128 i + t, so that it is one contiguous
// piece for cp.reduce.async.bulk, and shared memory is written without conflicts of banks. Nobody but the kernel here,
// whose threads hold the same registers, reads it.
#pragma once

#include "cuda/attention_schedule.cuh"
#include "cuda/attention_sm90.cuh"

namespace fastgpt::attention {

constexpr int kSumRows = 64;  // queries of a piece

// Pieces are numbered by sequence; packed ones leave room for a ragged end each.
__host__ __device__ inline int first_piece(const Params& p, const Sequence& s, int sequence) {
  if (p.first_queries != nullptr) return s.first_query / kSumRows + sequence;
  return sequence * ((p.queries + kSumRows - 1) / kSumRows);
}
__host__ __device__ inline int pieces(const Params& p) {
  if (p.first_queries != nullptr) return p.queries / kSumRows + p.sequences;
  return p.batch * ((p.queries + kSumRows - 1) / kSumRows);
}

// Floats that Params::grad_query_sums points to.
inline int64_t grad_sums_numbers(const Params& p) {
  return static_cast<int64_t>(pieces(p)) * p.heads * kSumRows * p.dim;
}

__device__ __forceinline__ float* sums_of(const Params& p, int piece, int head, int half) {
  return p.grad_query_sums + ((static_cast<int64_t>(piece) * p.heads + head) * 2 + half) * (kSumRows * p.dim / 2);
}

// The sequence that a piece belongs to: the last that does not begin behind it.
__device__ __forceinline__ int sequence_at(const Params& p, int piece) {
  if (p.first_queries == nullptr) return piece / ((p.queries + kSumRows - 1) / kSumRows);
  int low = 0, high = p.sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_piece(p, sequence_of(p, middle), middle) <= piece) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// A block a piece and head, 128 threads a half of the columns.
template <class T, int kDim>
__global__ void __launch_bounds__(256) attention_grad_query_sm90_kernel(const Params p) {
  const int piece = blockIdx.x, head = blockIdx.y, half = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int index = sequence_at(p, piece);
  const Sequence s = sequence_of(p, index);
  const int first = (piece - first_piece(p, s, index)) * kSumRows;
  if (first >= s.queries) return;
  float sums[kDim / 4];
  const float4* from = reinterpret_cast<const float4*>(sums_of(p, piece, head, half));
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const float4 four = from[128 * i + thread];
    sums[4 * i] = four.x, sums[4 * i + 1] = four.y, sums[4 * i + 2] = four.z, sums[4 * i + 3] = four.w;
  }
  const int row = first + thread / 32 * 16 + thread % 32 / 4;
  T* result = static_cast<T*>(p.grad_query) + s.batch * p.grad_query_stride.batch + head * p.grad_query_stride.head +
              s.first_query * p.grad_query_stride.row + half * (kDim / 2);
  store_sums(result, p.grad_query_stride.row, row, s.queries, sums, p.scale, p.scale);
}

}  // namespace fastgpt::attention
