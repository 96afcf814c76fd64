// The gradients of attention_sm80.cuh, without atomics: the same bits every time.
//
//   P = exp(scale S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q
//
// (arXiv 2205.14135, appendix B.4), delta the row sums of dO O. One kernel takes a block of keys and walks over the
// queries for dK and dV, of all the query heads that share the key head; another takes a block of queries and walks
// over the keys for dQ. That makes seven products where one kernel with atomic additions to dQ makes five. The first
// computes S^T and dP^T, so that P^T and dS^T feed its two sums from registers.
//
// It has not run on a GPU yet; see docs/notes/emulation.md.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace fastgpt::attention {

template <int kDim>
struct Sm80Backward {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int BLOCK_ROWS = 16 * kWarps;              // keys for dK and dV, queries for dQ
  static constexpr int BLOCK_COLUMNS = kDim <= 64 ? 64 : 32;  // what it walks over; two blocks of it are in flight
  static constexpr int kRowsBytes = BLOCK_ROWS * kDim * 2, kColumnsBytes = BLOCK_COLUMNS * kDim * 2;
  static constexpr int kSharedBytes = 2 * kRowsBytes + 4 * kColumnsBytes + 4 * BLOCK_COLUMNS * 4;
};

// delta = sum of dO O over a row, a warp a row. kChip keeps the two engines' machine code apart: one kernel in files
// that are compiled for different chips would be found once, for some chip.
template <class T, int kChip>
__global__ void __launch_bounds__(128) attention_delta_kernel(const Params p) {
  const int lane = threadIdx.x % 32, head = blockIdx.y, batch = blockIdx.z;
  const int row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= p.queries) return;
  const T* out = static_cast<const T*>(p.out) + batch * p.out_stride.batch + head * p.out_stride.head;
  const T* grad = static_cast<const T*>(p.grad) + batch * p.grad_stride.batch + head * p.grad_stride.head;
  float sum = 0.0f;
  for (int i = lane; i < p.dim; i += 32) {
    sum += static_cast<float>(out[row * p.out_stride.row + i]) * static_cast<float>(grad[row * p.grad_stride.row + i]);
  }
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (lane == 0) p.delta[(static_cast<int64_t>(batch) * p.heads + head) * p.queries + row] = sum;
}

template <class T, int kDim>
__global__ void __launch_bounds__(Sm80Backward<kDim>::kThreads) attention_bwd_kv_sm80_kernel(const Params p) {
  using Shape = Sm80Backward<kDim>;
  constexpr int kThreads = Shape::kThreads, BLOCK_N = Shape::BLOCK_ROWS, BLOCK_M = Shape::BLOCK_COLUMNS;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t k_tile = ptx::shared_address(shared), v_tile = k_tile + Shape::kRowsBytes;
  const uint32_t q_tiles = v_tile + Shape::kRowsBytes, grad_tiles = q_tiles + 2 * Shape::kColumnsBytes;
  float* lse_tiles = reinterpret_cast<float*>(shared + 2 * Shape::kRowsBytes + 4 * Shape::kColumnsBytes);
  float* delta_tiles = lse_tiles + 2 * BLOCK_M;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = 16 * warp;
  const int kv_head = blockIdx.y, batch = blockIdx.z, group = p.heads / p.kv_heads;
  const int first_key = blockIdx.x * BLOCK_N, offset = p.keys - p.queries;
  const T* key = static_cast<const T*>(p.key) + batch * p.key_stride.batch + kv_head * p.key_stride.head;
  const T* value = static_cast<const T*>(p.value) + batch * p.value_stride.batch + kv_head * p.value_stride.head;

  // Causal: the first query that sees the block's first key.
  const int first_query = p.causal ? max(0, first_key - offset) / BLOCK_M * BLOCK_M : 0;
  const int blocks = max(0, (p.queries - first_query + BLOCK_M - 1) / BLOCK_M), steps = blocks * group;
  const float scale = p.scale * kLog2E;

  const auto load = [&](int step) {
    const int head = kv_head * group + step / blocks, stage = step % 2, first = first_query + step % blocks * BLOCK_M;
    const T* query = static_cast<const T*>(p.query) + batch * p.query_stride.batch + head * p.query_stride.head;
    const T* grad = static_cast<const T*>(p.grad) + batch * p.grad_stride.batch + head * p.grad_stride.head;
    const uint32_t at = stage * Shape::kColumnsBytes;
    load_tile<T, kDim, BLOCK_M, kThreads>(q_tiles + at, query, p.query_stride.row, first, p.queries);
    load_tile<T, kDim, BLOCK_M, kThreads>(grad_tiles + at, grad, p.grad_stride.row, first, p.queries);
    if (threadIdx.x < BLOCK_M) {  // past the end lse is +inf, which makes the weights 0
      const int row = first + threadIdx.x;
      const int64_t i = (static_cast<int64_t>(batch) * p.heads + head) * p.queries + row;
      lse_tiles[stage * BLOCK_M + threadIdx.x] = row < p.queries ? p.lse[i] * kLog2E : INFINITY;
      delta_tiles[stage * BLOCK_M + threadIdx.x] = row < p.queries ? p.delta[i] : 0.0f;
    }
    ptx::cp_async_commit();
  };

  float grad_key[1][kDim / 8][4], grad_value[1][kDim / 8][4];
  clear(grad_key);
  clear(grad_value);
  if (steps > 0) {
    load_tile<T, kDim, BLOCK_N, kThreads>(k_tile, key, p.key_stride.row, first_key, p.keys);
    load_tile<T, kDim, BLOCK_N, kThreads>(v_tile, value, p.value_stride.row, first_key, p.keys);
    load(0);
  }
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2, first = first_query + step % blocks * BLOCK_M;
    if (step + 1 < steps) {
      load(step + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // the stage is there
    const uint32_t q_tile = q_tiles + stage * Shape::kColumnsBytes,
                   grad_tile = grad_tiles + stage * Shape::kColumnsBytes;
    const float* lse = lse_tiles + stage * BLOCK_M;
    const float* delta = delta_tiles + stage * BLOCK_M;

    float weights[1][BLOCK_M / 8][4];  // S^T, then P^T: a key a row, a query a column
    multiply_transposed<T, kDim, BLOCK_M, 1>(
        weights, [&](int, int k, uint32_t (&a)[4]) { load_left<kDim>(a, k_tile, warp_row, k); }, q_tile);
    const bool diagonal = p.causal && first_key + BLOCK_N - 1 > first + offset;
#pragma unroll
    for (int n = 0; n < BLOCK_M / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_key + warp_row + lane / 4 + i / 2 * 8, column = 8 * n + 2 * (lane % 4) + i % 2;
        const bool masked = diagonal && row > first + column + offset;
        weights[0][n][i] = masked ? 0.0f : ptx::exp2_approx(weights[0][n][i] * scale - lse[column]);
      }
    }
    accumulate<T, kDim, BLOCK_M, 1>(grad_value, weights, grad_tile);

    float ds[1][BLOCK_M / 8][4];  // dP^T, then dS^T
    multiply_transposed<T, kDim, BLOCK_M, 1>(
        ds, [&](int, int k, uint32_t (&a)[4]) { load_left<kDim>(a, v_tile, warp_row, k); }, grad_tile);
#pragma unroll
    for (int n = 0; n < BLOCK_M / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * n + 2 * (lane % 4) + i % 2;
        ds[0][n][i] = weights[0][n][i] * (ds[0][n][i] - delta[column]);
      }
    }
    accumulate<T, kDim, BLOCK_M, 1>(grad_key, ds, q_tile);
    __syncthreads();  // the stage is free again
  }

  T* dk = static_cast<T*>(p.grad_key) + batch * p.grad_key_stride.batch + kv_head * p.grad_key_stride.head;
  T* dv = static_cast<T*>(p.grad_value) + batch * p.grad_value_stride.batch + kv_head * p.grad_value_stride.head;
  const int row = first_key + warp_row;
  store_rows<T, kDim, 1>(dk, p.grad_key_stride.row, row, p.keys, grad_key, [&](int, int) { return p.scale; });
  store_rows<T, kDim, 1>(dv, p.grad_value_stride.row, row, p.keys, grad_value, [](int, int) { return 1.0f; });
}

template <class T, int kDim>
__global__ void __launch_bounds__(Sm80Backward<kDim>::kThreads) attention_bwd_q_sm80_kernel(const Params p) {
  using Shape = Sm80Backward<kDim>;
  constexpr int kThreads = Shape::kThreads, BLOCK_M = Shape::BLOCK_ROWS, BLOCK_N = Shape::BLOCK_COLUMNS;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t q_tile = ptx::shared_address(shared), grad_tile = q_tile + Shape::kRowsBytes;
  const uint32_t k_tiles = grad_tile + Shape::kRowsBytes, v_tiles = k_tiles + 2 * Shape::kColumnsBytes;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = 16 * warp;
  const int block = gridDim.x - 1 - blockIdx.x;  // causal: the longest first
  const int head = blockIdx.y, batch = blockIdx.z, kv_head = head / (p.heads / p.kv_heads);
  const int first_query = block * BLOCK_M, offset = p.keys - p.queries;
  const T* query = static_cast<const T*>(p.query) + batch * p.query_stride.batch + head * p.query_stride.head;
  const T* grad = static_cast<const T*>(p.grad) + batch * p.grad_stride.batch + head * p.grad_stride.head;
  const T* key = static_cast<const T*>(p.key) + batch * p.key_stride.batch + kv_head * p.key_stride.head;
  const T* value = static_cast<const T*>(p.value) + batch * p.value_stride.batch + kv_head * p.value_stride.head;

  int seen = p.keys;
  if (p.causal) seen = max(0, min(p.keys, min(first_query + BLOCK_M, p.queries) + offset));
  const int steps = (seen + BLOCK_N - 1) / BLOCK_N;
  const float scale = p.scale * kLog2E;
  float lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_query + warp_row + lane / 4 + 8 * half;
    const int64_t i = (static_cast<int64_t>(batch) * p.heads + head) * p.queries + row;
    lse[half] = row < p.queries ? p.lse[i] * kLog2E : INFINITY;
    delta[half] = row < p.queries ? p.delta[i] : 0.0f;
  }

  const auto load = [&](int step) {
    const uint32_t at = step % 2 * Shape::kColumnsBytes;
    load_tile<T, kDim, BLOCK_N, kThreads>(k_tiles + at, key, p.key_stride.row, step * BLOCK_N, p.keys);
    load_tile<T, kDim, BLOCK_N, kThreads>(v_tiles + at, value, p.value_stride.row, step * BLOCK_N, p.keys);
    ptx::cp_async_commit();
  };

  float grad_query[1][kDim / 8][4];
  clear(grad_query);
  if (steps > 0) {
    load_tile<T, kDim, BLOCK_M, kThreads>(q_tile, query, p.query_stride.row, first_query, p.queries);
    load_tile<T, kDim, BLOCK_M, kThreads>(grad_tile, grad, p.grad_stride.row, first_query, p.queries);
    load(0);
  }
  for (int step = 0; step < steps; ++step) {
    const int first_key = step * BLOCK_N;
    if (step + 1 < steps) {
      load(step + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // the stage is there
    const uint32_t k_tile = k_tiles + step % 2 * Shape::kColumnsBytes,
                   v_tile = v_tiles + step % 2 * Shape::kColumnsBytes;

    float weights[1][BLOCK_N / 8][4], ds[1][BLOCK_N / 8][4];
    multiply_transposed<T, kDim, BLOCK_N, 1>(
        weights, [&](int, int k, uint32_t (&a)[4]) { load_left<kDim>(a, q_tile, warp_row, k); }, k_tile);
    multiply_transposed<T, kDim, BLOCK_N, 1>(
        ds, [&](int, int k, uint32_t (&a)[4]) { load_left<kDim>(a, grad_tile, warp_row, k); }, v_tile);
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_query + warp_row + lane / 4 + i / 2 * 8;
        const int column = first_key + 8 * n + 2 * (lane % 4) + i % 2;
        const int last = p.causal ? min(p.keys - 1, row + offset) : p.keys - 1;
        const float weight = column > last ? 0.0f : ptx::exp2_approx(weights[0][n][i] * scale - lse[i / 2]);
        ds[0][n][i] = weight * (ds[0][n][i] - delta[i / 2]);
      }
    }
    accumulate<T, kDim, BLOCK_N, 1>(grad_query, ds, k_tile);
    __syncthreads();  // the stage is free again
  }

  T* dq = static_cast<T*>(p.grad_query) + batch * p.grad_query_stride.batch + head * p.grad_query_stride.head;
  store_rows<T, kDim, 1>(dq, p.grad_query_stride.row, first_query + warp_row, p.queries, grad_query,
                         [&](int, int) { return p.scale; });
}

}  // namespace fastgpt::attention
