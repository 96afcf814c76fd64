// Which keys a query sees: plain arithmetic, on the host as on the device.
//
// Masks are aligned bottom-right: query i of a sequence stands at position i + keys - queries, and sees from `left`
// keys before it to `right` keys behind it. kUnlimited is no limit; a causal mask is right = 0. What a block has to
// walk over and what it has to mask follow from the same two functions, so no step outside of a window is ever loaded.
#pragma once

#include "cuda/attention_params.cuh"

namespace fastgpt::attention {

// The longest sequence, and no limit of a window; twice it and a tile fit an int.
constexpr int kUnlimited = (1 << 30) - 1024;

struct Range {
  int begin, end;  // nothing where end <= begin
  __host__ __device__ bool empty() const { return end <= begin; }
};

struct Sight {
  int queries, keys, left, right;

  // Keys that some query of `rows` sees; rows past the end see nothing.
  __host__ __device__ Range keys_of(Range rows) const {
    if (rows.begin >= queries) return {0, 0};
    const int offset = keys - queries, last = (rows.end < queries ? rows.end : queries) - 1 + offset;
    const int begin = rows.begin + offset - left, end = last + right + 1;
    return {begin > 0 ? begin : 0, end < keys ? end : keys};
  }

  // Queries that see some key of `rows`.
  __host__ __device__ Range queries_of(Range rows) const {
    if (rows.begin >= keys) return {0, 0};
    const int offset = keys - queries, last = (rows.end < keys ? rows.end : keys) - 1 - offset;
    const int begin = rows.begin - offset - right, end = last + left + 1;
    return {begin > 0 ? begin : 0, end < queries ? end : queries};
  }

  // Whether each of these queries sees each of these keys.
  __host__ __device__ bool whole(Range rows, Range columns) const {
    const int offset = keys - queries;
    return columns.end <= keys && columns.end - 1 <= rows.begin + offset + right &&
           columns.begin >= rows.end - 1 + offset - left;
  }
};

// Negative limits are none.
__host__ __device__ inline Sight sight_of(const Params& p, int queries, int keys) {
  const int left = p.window_left < 0 || p.window_left > kUnlimited ? kUnlimited : p.window_left;
  const int right = p.window_right < 0 || p.window_right > kUnlimited ? kUnlimited : p.window_right;
  return {queries, keys, left, p.causal ? 0 : right};
}

// The steps of kStep rows that a range lies in: from `begin` to `end`, both 0 where it is empty.
template <int kStep>
__host__ __device__ Range steps_of(Range range) {
  if (range.empty()) return {0, 0};
  return {range.begin / kStep, (range.end + kStep - 1) / kStep};
}

// Scores of a warpgroup's product outside of what its rows see, this thread's first and the one 8 below, become
// `value`; `first` is the product's first column.
template <int kCount>
__device__ __forceinline__ void mask_outside(float (&scores)[kCount], int first, Range upper, Range lower,
                                             float value) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = first + 8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2;
    const Range& seen = i / 2 % 2 ? lower : upper;
    if (column < seen.begin || column >= seen.end) scores[i] = value;
  }
}

}  // namespace fastgpt::attention
