// Attention for sm_80 and later by mma.sync and cp.async, never storing the queries x keys matrix (FlashAttention-2,
// arXiv 2307.08691): O = softmax(scale Q K^T) V and the log-sum-exp of the scores.
//
// A block takes BLOCK_M queries of one head and walks over the keys BLOCK_N at a time, from the last that its queries
// see to the first, so that only the first steps need a mask. K and V have one buffer each: the next K is on its way
// while P V runs, V while Q K^T does. Q stays in registers. Scores and sums are fp32, P is rounded to the inputs' type.
//
// head_dim 32, 64, 96, 128; bf16 and fp16; grouped heads; any number of queries and keys. No dropout.
// It has not run on a GPU yet; see docs/notes/emulation.md.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace fastgpt::attention {

template <int kDim>
struct Sm80Forward {
  // 32 rows a warp halve the reads of K and V from shared memory; past D = 64 their sums would not fit the registers.
  static constexpr int kWarps = kDim <= 64 ? 4 : 8, kTiles = kDim <= 64 ? 2 : 1;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int BLOCK_M = 16 * kTiles * kWarps, BLOCK_N = 64;
  static constexpr int kSharedBytes = (BLOCK_M + 2 * BLOCK_N) * kDim * 2;
};

template <class T, int kDim>
__global__ void __launch_bounds__(Sm80Forward<kDim>::kThreads) attention_fwd_sm80_kernel(const Params p) {
  using Shape = Sm80Forward<kDim>;
  constexpr int kTiles = Shape::kTiles, kThreads = Shape::kThreads;
  constexpr int BLOCK_M = Shape::BLOCK_M, BLOCK_N = Shape::BLOCK_N;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t q_tile = ptx::shared_address(shared);
  const uint32_t k_tile = q_tile + BLOCK_M * kDim * 2, v_tile = k_tile + BLOCK_N * kDim * 2;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block = gridDim.x - 1 - blockIdx.x;  // causal: the longest first
  const int head = blockIdx.y, batch = blockIdx.z, kv_head = head / (p.heads / p.kv_heads);
  const int first_query = block * BLOCK_M, offset = p.keys - p.queries;
  const T* query = static_cast<const T*>(p.query) + batch * p.query_stride.batch + head * p.query_stride.head;
  const T* key = static_cast<const T*>(p.key) + batch * p.key_stride.batch + kv_head * p.key_stride.head;
  const T* value = static_cast<const T*>(p.value) + batch * p.value_stride.batch + kv_head * p.value_stride.head;

  int seen = p.keys;  // keys that some query of this block sees
  if (p.causal) seen = max(0, min(p.keys, min(first_query + BLOCK_M, p.queries) + offset));
  const int steps = (seen + BLOCK_N - 1) / BLOCK_N;

  float out[kTiles][kDim / 8][4], largest[kTiles][2], sum[kTiles][2];
  clear(out);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) largest[t][half] = -INFINITY, sum[t][half] = 0.0f;
  }
  const int warp_row = warp * 16 * kTiles;
  const float scale = p.scale * kLog2E;
  uint32_t q[kTiles][kDim / 16][4];

  if (steps > 0) {
    load_tile<T, kDim, BLOCK_M, kThreads>(q_tile, query, p.query_stride.row, first_query, p.queries);
    load_tile<T, kDim, BLOCK_N, kThreads>(k_tile, key, p.key_stride.row, (steps - 1) * BLOCK_N, p.keys);
    ptx::cp_async_commit();
  }
  for (int step = steps - 1; step >= 0; --step) {
    const int first_key = step * BLOCK_N;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K is there, and V's buffer is free
    if (step == steps - 1) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) load_left<kDim>(q[t][k], q_tile, warp_row + 16 * t, k);
      }
    }
    load_tile<T, kDim, BLOCK_N, kThreads>(v_tile, value, p.value_stride.row, first_key, p.keys);
    ptx::cp_async_commit();

    float scores[kTiles][BLOCK_N / 8][4];
    multiply_transposed<T, kDim, BLOCK_N, kTiles>(
        scores,
        [&](int t, int k, uint32_t (&a)[4]) {
#pragma unroll
          for (int r = 0; r < 4; ++r) a[r] = q[t][k][r];
        },
        k_tile);

    const bool ragged = first_key + BLOCK_N > p.keys;
    const bool diagonal = p.causal && first_key + BLOCK_N - 1 > first_query + offset;
    if (ragged || diagonal) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = first_query + warp_row + 16 * t + lane / 4 + i / 2 * 8;
            const int column = first_key + 8 * n + 2 * (lane % 4) + i % 2;
            const int last = p.causal ? min(p.keys - 1, row + offset) : p.keys - 1;
            if (column > last) scores[t][n][i] = -INFINITY;
          }
        }
      }
    }

#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m = largest[t][half];
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; ++n) m = fmaxf(m, fmaxf(scores[t][n][2 * half], scores[t][n][2 * half + 1]));
        m = row_max(m);
        const float base = m == -INFINITY ? 0.0f : m * scale;  // a row that has seen no key yet
        const float shrink = ptx::exp2_approx(largest[t][half] * scale - base);
        float partial = 0.0f;
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[t][n][i] = ptx::exp2_approx(scores[t][n][i] * scale - base);
            partial += scores[t][n][i];
          }
        }
        sum[t][half] = sum[t][half] * shrink + partial;  // the four lanes' parts are added at the end
        largest[t][half] = m;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          out[t][n][2 * half] *= shrink;
          out[t][n][2 * half + 1] *= shrink;
        }
      }
    }

    ptx::cp_async_wait<0>();
    __syncthreads();  // V is there, and K's buffer is free
    if (step > 0) {
      load_tile<T, kDim, BLOCK_N, kThreads>(k_tile, key, p.key_stride.row, first_key - BLOCK_N, p.keys);
      ptx::cp_async_commit();
    }
    accumulate<T, kDim, BLOCK_N, kTiles>(out, scores, v_tile);
  }

#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[t][half] = row_sum(sum[t][half]);
      const int row = first_query + warp_row + 16 * t + lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < p.queries) {
        const float lse = sum[t][half] == 0.0f ? -INFINITY : largest[t][half] * p.scale + logf(sum[t][half]);
        p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.queries + row] = lse;
      }
    }
  }
  T* result = static_cast<T*>(p.out) + batch * p.out_stride.batch + head * p.out_stride.head;
  store_rows<T, kDim, kTiles>(result, p.out_stride.row, first_query + warp_row, p.queries, out,
                              [&](int t, int half) { return sum[t][half] == 0.0f ? 0.0f : 1.0f / sum[t][half]; });
}

}  // namespace fastgpt::attention
