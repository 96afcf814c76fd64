// Attention of a few queries against a long cache of keys: as fast as K and V can be read.
//
// The keys are split over blocks, so that one sequence fills a GPU (Flash-Decoding; the parts are put together as in
// arXiv 2311.01282, section 3). A block takes one key head, a part of its keys and up to kRows rows, the queries of all
// query heads that share the head, so that K and V are read once for them. kLanes lanes hold a key's 16-byte pieces;
// they add up the dot products by shuffles and keep their columns of the sums, all in fp32. Every group of lanes has a
// running maximum of its own; groups, warps and blocks meet at the end, in a fixed order: the same bits every time.
//
// It has not run on a GPU yet; see docs/notes/cuda.md.
#pragma once

#include "cuda/attention_params.cuh"
#include "cuda/dtype.cuh"
#include "cuda/ptx.cuh"

namespace fastgpt::attention {

constexpr int kDecodeWarps = 4, kDecodeThreads = 32 * kDecodeWarps;

// Sums relative to a maximum, in powers of two: what the parts of a row are merged by.
__device__ __forceinline__ float decode_factor(float largest, float of_all) {
  return ptx::exp2_approx(largest - (of_all == -INFINITY ? 0.0f : of_all));
}

template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(kDecodeThreads) attention_decode_kernel(const DecodeParams d) {
  constexpr int kPiece = kWide<T>, kPieces = kDim / kPiece;
  constexpr int kLanes = kPieces <= 4 ? 4 : kPieces <= 8 ? 8 : kPieces <= 16 ? 16 : 32;
  constexpr int kGroups = 32 / kLanes, kUnroll = 4, kStep = kUnroll * kGroups;
  static_assert(kPieces <= 32);
  __shared__ float all_sums[kDecodeWarps][kRows][kDim];
  __shared__ float all_largest[kDecodeWarps][kRows];
  __shared__ float all_totals[kDecodeWarps][kRows];

  const Params& p = d.attention;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, piece = lane % kLanes, group = lane / kLanes;
  const bool active = piece < kPieces;  // 96 columns leave four lanes of sixteen idle
  const int heads_a_key = p.heads / p.kv_heads, rows = heads_a_key * p.queries, offset = p.keys - p.queries;
  const int kv_head = blockIdx.y % p.kv_heads, first_row = blockIdx.y / p.kv_heads * kRows, batch = blockIdx.z;
  const int first_key = blockIdx.x * d.keys_per_split, end = min(p.keys, first_key + d.keys_per_split);
  const T* key = static_cast<const T*>(p.key) + batch * p.key_stride.batch + kv_head * p.key_stride.head;
  const T* value = static_cast<const T*>(p.value) + batch * p.value_stride.batch + kv_head * p.value_stride.head;

  float query[kRows][kPiece], sums[kRows][kPiece], largest[kRows], total[kRows];
  int last[kRows];  // the last key that a row sees
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r, head = kv_head * heads_a_key + row / p.queries, i = row % p.queries;
    last[r] = row >= rows ? -1 : p.causal ? min(p.keys - 1, i + offset) : p.keys - 1;
    largest[r] = -INFINITY, total[r] = 0.0f;
#pragma unroll
    for (int e = 0; e < kPiece; ++e) query[r][e] = sums[r][e] = 0.0f;
    if (row < rows && active) {
      const T* from = static_cast<const T*>(p.query) + batch * p.query_stride.batch + head * p.query_stride.head +
                      i * p.query_stride.row;
      const Vector<T, kPiece> v = load<kPiece>(from + piece * kPiece);
#pragma unroll
      for (int e = 0; e < kPiece; ++e) query[r][e] = to_float(v.v[e]) * (p.scale * kLog2E);
    }
  }

  for (int step = first_key + warp * kStep; step < end; step += kDecodeWarps * kStep) {
    Vector<T, kPiece> k[kUnroll], v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int j = step + u * kGroups + group;
      if (j < end && active) {
        k[u] = load<kPiece>(key + j * p.key_stride.row + piece * kPiece);
        v[u] = load<kPiece>(value + j * p.value_stride.row + piece * kPiece);
      } else {
#pragma unroll
        for (int e = 0; e < kPiece; ++e) k[u].v[e] = v[u].v[e] = from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float scores[kUnroll], m = largest[r];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int j = step + u * kGroups + group;
        float s = 0.0f;
#pragma unroll
        for (int e = 0; e < kPiece; ++e) s += query[r][e] * to_float(k[u].v[e]);
#pragma unroll
        for (int bits = kLanes / 2; bits > 0; bits /= 2) s += __shfl_xor_sync(0xffffffffu, s, bits);
        scores[u] = j < end && j <= last[r] ? s : -INFINITY;
        m = fmaxf(m, scores[u]);
      }
      const float shrink = decode_factor(largest[r], m);
      largest[r] = m;
      total[r] *= shrink;
#pragma unroll
      for (int e = 0; e < kPiece; ++e) sums[r][e] *= shrink;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float weight = decode_factor(scores[u], m);
        total[r] += weight;
#pragma unroll
        for (int e = 0; e < kPiece; ++e) sums[r][e] += weight * to_float(v[u].v[e]);
      }
    }
  }

  // The groups of a warp, then the warps.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int bits = kLanes; bits < 32; bits *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, largest[r], bits), m = fmaxf(largest[r], other);
      const float mine = decode_factor(largest[r], m), theirs = decode_factor(other, m);
      total[r] = total[r] * mine + __shfl_xor_sync(0xffffffffu, total[r], bits) * theirs;
#pragma unroll
      for (int e = 0; e < kPiece; ++e) {
        sums[r][e] = sums[r][e] * mine + __shfl_xor_sync(0xffffffffu, sums[r][e], bits) * theirs;
      }
      largest[r] = m;
    }
    if (group == 0 && active) {
#pragma unroll
      for (int e = 0; e < kPiece; ++e) all_sums[warp][r][piece * kPiece + e] = sums[r][e];
    }
    if (lane == 0) all_largest[warp][r] = largest[r], all_totals[warp][r] = total[r];
  }
  __syncthreads();  // every warp's sums are there

  for (int i = threadIdx.x; i < kRows * kDim; i += kDecodeThreads) {
    const int r = i / kDim, column = i % kDim, row = first_row + r;
    if (row >= rows) continue;
    float m = all_largest[0][r], whole = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 1; w < kDecodeWarps; ++w) m = fmaxf(m, all_largest[w][r]);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float factor = decode_factor(all_largest[w][r], m);
      whole += all_totals[w][r] * factor;
      sum += all_sums[w][r][column] * factor;
    }
    const int head = kv_head * heads_a_key + row / p.queries, query_index = row % p.queries;
    const int64_t at = (static_cast<int64_t>(batch) * p.heads + head) * p.queries + query_index;
    const float result = whole == 0.0f ? 0.0f : sum / whole, lse = whole == 0.0f ? -INFINITY : m + log2f(whole);
    if (d.splits == 1) {
      T* out = static_cast<T*>(p.out) + batch * p.out_stride.batch + head * p.out_stride.head;
      out[query_index * p.out_stride.row + column] = from_float<T>(result);
      if (column == 0) p.lse[at] = lse / kLog2E;
    } else {
      const int64_t part = blockIdx.x * (static_cast<int64_t>(p.batch) * p.heads * p.queries) + at;
      d.part[part * kDim + column] = result;
      if (column == 0) d.part_lse[part] = lse;
    }
  }
}

// A warp a row: the parts' results, weighted by their shares of the whole sum.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads) attention_decode_merge_kernel(const DecodeParams d) {
  const Params& p = d.attention;
  const int lane = threadIdx.x % 32;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDecodeWarps + threadIdx.x / 32;
  if (row >= rows) return;
  float m = -INFINITY, whole = 0.0f;
  for (int s = 0; s < d.splits; ++s) m = fmaxf(m, d.part_lse[s * rows + row]);
  for (int s = 0; s < d.splits; ++s) whole += decode_factor(d.part_lse[s * rows + row], m);
  const int head = static_cast<int>(row / p.queries % p.heads), batch = static_cast<int>(row / p.queries / p.heads);
  T* out = static_cast<T*>(p.out) + batch * p.out_stride.batch + head * p.out_stride.head +
           row % p.queries * p.out_stride.row;
  for (int column = lane; column < p.dim; column += 32) {
    float sum = 0.0f;
    for (int s = 0; s < d.splits; ++s) {
      sum += decode_factor(d.part_lse[s * rows + row], m) * d.part[(s * rows + row) * p.dim + column];
    }
    out[column] = from_float<T>(whole == 0.0f ? 0.0f : sum / whole);
  }
  if (lane == 0) p.lse[row] = whole == 0.0f ? -INFINITY : (m + log2f(whole)) / kLog2E;
}

}  // namespace fastgpt::attention
