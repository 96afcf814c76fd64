// Which weights of attention are kept, in the layout in which a warpgroup holds a product.
//
// Weight (b, h, i, j) of (B, H, Tq, Tk) is element e = ((b H + h) Tq + i) Tk + j of the mask of every engine: kept
// where word e % 4 of philox4x32_10(e / 4, seed) is at least the threshold. Where rows of weights begin at multiples of
// four, the lanes that hold a counter's four weights share its words: one of them makes them, all get their bits by
// shuffles, so a weight costs a quarter of a call. Elsewhere each weight makes its own.
//
// The bits need the tensor cores' results in nothing, so they are made while a product is on its way.
#pragma once

#include "cuda/attention_schedule.cuh"
#include "cuda/philox.cuh"

namespace fastgpt::attention {

struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  int64_t stride;  // weights a query
  bool aligned;    // every query's weights of this sequence begin at a multiple of four
};

__device__ __forceinline__ Dropout dropout_of(const Params& p, const Sequence& s) {
  return {static_cast<uint64_t>(*p.seed), p.threshold, p.keys, p.keys % 4 == 0 && s.first_key % 4 == 0};
}

// The element of a sequence's first weight of a head.
__device__ __forceinline__ int64_t first_weight(const Params& p, const Sequence& s, int head) {
  return ((static_cast<int64_t>(s.batch) * p.heads + head) * p.queries + s.first_query) * p.keys + s.first_key;
}

// Bit i % 32 of kept[i / 32]: whether element i of this thread is kept. `row` is the thread's first row, its second is
// 8 further; `first` is the product's first column. kKeys: rows are keys and columns queries, else the other way round.
template <bool kKeys, int kWords>
__device__ __forceinline__ void kept_bits(uint32_t (&kept)[kWords], const Dropout& d, int64_t origin, int row,
                                          int first) {
  const int lane = threadIdx.x % 32;
  const auto element = [&](int r, int column) {
    return origin + (kKeys ? column * d.stride + r : r * d.stride + column);
  };
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    const int from = first + 64 * word;  // eight groups of eight columns
    uint32_t own = 0;
    if (!d.aligned) {
#pragma unroll 1
      for (int i = 0; i < 32; ++i) {
        const int64_t e = element(row + i / 2 % 2 * 8, from + i / 4 * 8 + lane % 4 * 2 + i % 2);
        const cuda::PhiloxWords w = cuda::philox(e >> 2, d.seed);
        const uint32_t low = e & 1 ? w.word[1] : w.word[0], high = e & 1 ? w.word[3] : w.word[2];
        own |= static_cast<uint32_t>((e & 2 ? high : low) >= d.threshold) << i;
      }
      kept[word] = own;
      continue;
    }
    // A counter's four weights lie in a row, held by two lanes that have it and the one 8 below in common: the even
    // lane takes the upper. With kKeys they lie in a column, held by four lanes that have four columns' parts in
    // common.
    const int part = kKeys ? lane / 4 % 4 : 2 * (lane % 2);
    const int r = (kKeys ? row - row % 4 : row) + part / 2 * 8;
    const int column = from + (kKeys ? lane % 4 * 2 + part % 2 : lane % 4 / 2 * 4);
#pragma unroll 1
    for (int n = 0; n < 8; ++n) {
      const cuda::PhiloxWords w = cuda::philox(element(r, column + 8 * n) >> 2, d.seed);
#pragma unroll
      for (int e = 0; e < 4; ++e) own |= static_cast<uint32_t>(w.word[e] >= d.threshold) << (4 * n + e);
    }
    if (kKeys) {
      kept[word] = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint32_t theirs = __shfl_sync(0xffffffffu, own, (lane & ~12) | c << 2);
        kept[word] |= (theirs >> part & 0x11111111u) << c;
      }
    } else {
      const uint32_t upper = __shfl_sync(0xffffffffu, own, lane & ~1), lower = __shfl_sync(0xffffffffu, own, lane | 1);
      kept[word] = (upper >> part & 0x33333333u) | (lower >> part & 0x33333333u) << 2;
    }
  }
}

template <int kCount>
__device__ __forceinline__ void drop(float (&x)[kCount], const uint32_t (&kept)[kCount / 32], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = kept[i / 32] >> i % 32 & 1 ? x[i] * factor : 0.0f;
}

}  // namespace fastgpt::attention
