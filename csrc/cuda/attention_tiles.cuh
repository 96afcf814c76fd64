// What the attention kernels for sm_80 share: tiles in shared memory and the two products made of mma.m16n8k16.
//
// A warp owns 16 rows (or a few times 16) of a block of scores. Its product with the columns' tile leaves the scores in
// registers as the tensor cores give them, and that very layout is the left operand of the next product, so weights
// never go through shared memory (FlashAttention-2, arXiv 2307.08691, section 3.3).
#pragma once

#include <cstdint>

#include "cuda/attention_params.cuh"
#include "cuda/ptx.cuh"

namespace fastgpt::attention {

// Byte of 16-byte chunk `chunk` of row `row` in a tile of rows of kDim halves. The chunks of a row are permuted so that
// the same chunk of eight consecutive rows lies in eight different groups of banks, for ldmatrix and for cp.async.
template <int kDim>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  const int turn = kDim % 64 == 0 ? row & 7 : (row >> 1) & 3;
  return static_cast<uint32_t>(row * kDim * 2 + ((chunk ^ turn) << 4));
}

// kRows rows from `first` on of a matrix of `rows` rows, zeros past its end, by all kThreads threads.
template <class T, int kDim, int kRows, int kThreads>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* matrix, int64_t stride, int first, int rows) {
  constexpr int kChunks = kDim / 8;
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll
  for (int n = 0; n < kRows * kChunks / kThreads; ++n) {
    const int i = n * kThreads + threadIdx.x, row = i / kChunks, chunk = i % kChunks;
    const bool inside = first + row < rows;
    const T* from = inside ? matrix + (first + row) * stride + chunk * 8 : matrix;
    ptx::cp_async_16(tile + tile_offset<kDim>(row, chunk), from, inside);
  }
}

// The left operand of step `k`: 16 rows from `row` on, columns 16 k to 16 k + 15.
template <int kDim>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], uint32_t tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, tile + tile_offset<kDim>(row + lane % 16, 2 * k + lane / 16));
}

// scores[t] = A_t B^T for kTiles tiles of 16 rows of A and kColumns rows of B; left(t, k, a) gives the operands of A.
template <class T, int kDim, int kColumns, int kTiles, class Left>
__device__ __forceinline__ void multiply_transposed(float (&scores)[kTiles][kColumns / 8][4], Left left,
                                                    uint32_t columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[t][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) left(t, k, a[t]);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      const int row = 16 * n + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4(b, columns + tile_offset<kDim>(row, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        ptx::mma_m16n8k16<T>(scores[t][2 * n], a[t], b[0], b[1]);
        ptx::mma_m16n8k16<T>(scores[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

// sums[t] += W_t B, the weights W (16 x kInner a tile) in registers as a product left them, B (kInner, kDim) a tile.
template <class T, int kDim, int kInner, int kTiles>
__device__ __forceinline__ void accumulate(float (&sums)[kTiles][kDim / 8][4],
                                           const float (&weights)[kTiles][kInner / 8][4], uint32_t tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kInner / 16; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float (&w)[4] = weights[t][2 * k + r / 2];
        a[t][r] = ptx::pack<T>(w[r % 2 * 2], w[r % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4_transposed(b, tile + tile_offset<kDim>(16 * k + lane % 16, 2 * n + lane / 16));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        ptx::mma_m16n8k16<T>(sums[t][2 * n], a[t], b[0], b[1]);
        ptx::mma_m16n8k16<T>(sums[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

template <int kTiles, int kCount>
__device__ __forceinline__ void clear(float (&x)[kTiles][kCount][4]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[t][n][i] = 0.0f;
    }
  }
}

// Over the four lanes that hold a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Rows `first` + 16 t + lane / 4 (+ 8) of a result, times `factor(t, half)`, where they are below `rows`.
template <class T, int kDim, int kTiles, class Factor>
__device__ __forceinline__ void store_rows(T* matrix, int64_t stride, int first, int rows,
                                           const float (&sums)[kTiles][kDim / 8][4], Factor factor) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * t + lane / 4 + 8 * half;
      const float f = factor(t, half);
      if (row >= rows) continue;
      T* at = matrix + row * stride + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float (&s)[4] = sums[t][n];
        *reinterpret_cast<uint32_t*>(at + 8 * n) = ptx::pack<T>(s[2 * half] * f, s[2 * half + 1] * f);
      }
    }
  }
}

}  // namespace fastgpt::attention
