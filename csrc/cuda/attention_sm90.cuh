// Attention for Hopper: tensor copies, wgmma, a producer and two consumers (FlashAttention-3, arXiv 2407.08608).
//
// A persistent grid; a block takes tiles of 128 queries. One thread of the first warpgroup brings Q, K and V; each of
// the other two has 64 of the queries, multiplies, and keeps scores, weights and sums in registers. Two overlaps:
//   - within a warpgroup S(j + 1) = Q K^T and P(j) V are both issued before the softmax of S(j + 1) begins;
//   - the warpgroups take turns at issuing, by named barriers, so that one multiplies while the other takes
//   exponentials.
// O leaves by the copy engine too, a warp's 16 rows at a time.
//
// Keys go from the last that a tile sees to the first, so only the first steps need a mask; rows past the end of a head
// come as zeros from the copies.
//
// head_dim 64 and 128, bf16 and fp16, causal, full and sliding windows, grouped heads, any number of queries and keys,
// packed sequences (what a step reads past the end of one is the next one's, and has weight 0), dropout of
// the weights. Switched off by
// default: it has not run on a GPU yet; see docs/notes/hopper.md.
#pragma once

#include <cuda.h>

#include "cuda/attention_dropout.cuh"
#include "cuda/attention_schedule.cuh"
#include "cuda/attention_tiles.cuh"
#include "cuda/hopper.cuh"

namespace fastgpt::attention {

template <int kDim>
struct Sm90Forward {
  static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
  static constexpr int BLOCK_M = 64 * kConsumers, BLOCK_N = 128;
  static constexpr int kStages = kDim == 64 ? 4 : 2;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 240;
  static constexpr int kQueryBytes = BLOCK_M * kDim * 2, kStageBytes = BLOCK_N * kDim * 2;
  static constexpr int kBarrierBytes = 8 * (2 + 4 * kStages);
  // Q and the tile by which O leaves, the rings of K and V; 1024: to align.
  static constexpr int kSharedBytes = 1024 + 2 * kQueryBytes + 2 * kStages * kStageBytes + kBarrierBytes;
};

// The tiles and barriers of a block, as addresses of shared memory.
template <int kDim>
struct Sm90ForwardMemory {
  using Shape = Sm90Forward<kDim>;
  uint32_t base;
  __device__ __forceinline__ uint32_t query() const { return base; }
  __device__ __forceinline__ uint32_t out() const { return base + Shape::kQueryBytes; }
  __device__ __forceinline__ uint32_t key(int stage) const {
    return base + 2 * Shape::kQueryBytes + stage * Shape::kStageBytes;
  }
  __device__ __forceinline__ uint32_t value(int stage) const { return key(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t barriers() const { return key(2 * Shape::kStages); }
  __device__ __forceinline__ uint32_t query_full() const { return barriers(); }
  __device__ __forceinline__ uint32_t query_empty() const { return barriers() + 8; }
  __device__ __forceinline__ uint32_t key_full(int stage) const { return barriers() + 16 + 32 * stage; }
  __device__ __forceinline__ uint32_t key_empty(int stage) const { return key_full(stage) + 8; }
  __device__ __forceinline__ uint32_t value_full(int stage) const { return key_full(stage) + 16; }
  __device__ __forceinline__ uint32_t value_empty(int stage) const { return key_full(stage) + 24; }
};

// Scores of a warpgroup's 64 rows become weights relative to the rows' new maxima; `shrink` takes older sums along.
template <int kCount>
__device__ __forceinline__ void softmax_step(float (&scores)[kCount], float (&largest)[2], float (&sum)[2],
                                             float (&shrink)[2], float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float m = largest[half];
#pragma unroll
    for (int i = 2 * half; i < kCount; i += 4) m = fmaxf(m, fmaxf(scores[i], scores[i + 1]));
    m = row_max(m);
    const float base = m == -INFINITY ? 0.0f : m * scale;  // a row that has seen no key yet
    shrink[half] = ptx::exp2_approx(largest[half] * scale - base);
    float partial = 0.0f;
#pragma unroll
    for (int i = 2 * half; i < kCount; i += 4) {
      scores[i] = ptx::exp2_approx(scores[i] * scale - base);
      scores[i + 1] = ptx::exp2_approx(scores[i + 1] * scale - base);
      partial += scores[i] + scores[i + 1];
    }
    sum[half] = sum[half] * shrink[half] + partial;  // the four lanes' parts are added at the end
    largest[half] = m;
  }
}

// The part of a result that a warpgroup holds; `row` is this thread's first, its second is 8 further.
template <class T, int kCount>
__device__ __forceinline__ void store_sums(T* matrix, int64_t stride, int row, int rows, const float (&sums)[kCount],
                                           float factor0, float factor1) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= rows) continue;
    const float f = half == 0 ? factor0 : factor1;
    T* at = matrix + (row + 8 * half) * stride + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) {
      *reinterpret_cast<uint32_t*>(at + 8 * n) =
          ptx::pack<T>(sums[4 * n + 2 * half] * f, sums[4 * n + 2 * half + 1] * f);
    }
  }
}

// A warp's 16 rows of O, `row` the first of them in the tile, by way of its part of shared memory, which the store of
// its tile before may still be reading. Rows past the tensor's end are not written.
template <class T, int kDim>
__device__ __forceinline__ void store_out(const CUtensorMap& map, uint32_t tile, int row, const float (&out)[kDim / 2],
                                          const float (&factor)[2], int first, int head, int batch) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) ptx::bulk_wait_read<0>();  // the others meet it at the first stmatrix
#pragma unroll
  for (int panel = 0; panel < kDim / 64; ++panel) {
    uint32_t rows[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = 8 * (4 * panel + k) + 2 * r;
        rows[k][r] = ptx::pack<T>(out[i] * factor[r % 2], out[i + 1] * factor[r % 2]);
      }
    }
    hopper::store_left(tile + panel * Sm90Forward<kDim>::BLOCK_M * hopper::kPanelRowBytes, row, rows);
  }
  ptx::fence_proxy_async();  // of O
  __syncwarp();              // written
  if (lane == 0) {
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
      const int at = panel * Sm90Forward<kDim>::BLOCK_M + row;
      ptx::tensor_store_4d(&map, tile + at * hopper::kPanelRowBytes, 64 * panel, first, head, batch);
    }
    ptx::bulk_commit();
  }
}

template <int kDim>
__device__ __forceinline__ void attention_fwd_sm90_produce(const CUtensorMap& q_map, const CUtensorMap& k_map,
                                                           const CUtensorMap& v_map, const Params& p,
                                                           const Schedule& schedule, Sm90ForwardMemory<kDim> memory) {
  using Shape = Sm90Forward<kDim>;
  constexpr int BLOCK_M = Shape::BLOCK_M, BLOCK_N = Shape::BLOCK_N;
  const auto load = [&](uint32_t tile, const CUtensorMap& map, uint32_t full, int rows, int first, int head,
                        int batch) {
    ptx::mbarrier_arrive_expect(full, rows * kDim * 2);
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
      ptx::tensor_load_4d(tile + panel * rows * hopper::kPanelRowBytes, &map, full, 64 * panel, first, head, batch);
    }
  };
  hopper::Place<Shape::kStages> place;
  uint32_t query_parity = 0;
  for (int index = blockIdx.x, count = schedule.count(); index < count; index += gridDim.x) {
    const Tile tile = schedule.tile(index);
    const Sequence s = sequence_of(p, tile.sequence);
    const Sight sight = sight_of(p, s.queries, s.keys);
    const int first_query = tile.block * BLOCK_M, kv_head = tile.head / (p.heads / p.kv_heads);
    const Range steps = steps_of<BLOCK_N>(sight.keys_of({first_query, first_query + BLOCK_M}));
    if (steps.empty()) continue;
    ptx::mbarrier_wait(memory.query_empty(), query_parity ^ 1);
    load(memory.query(), q_map, memory.query_full(), BLOCK_M, s.first_query + first_query, tile.head, s.batch);
    query_parity ^= 1;
    for (int step = steps.end - 1; step >= steps.begin; --step) {
      ptx::mbarrier_wait(memory.key_empty(place.stage), place.parity ^ 1);
      load(memory.key(place.stage), k_map, memory.key_full(place.stage), BLOCK_N, s.first_key + step * BLOCK_N, kv_head,
           s.batch);
      ptx::mbarrier_wait(memory.value_empty(place.stage), place.parity ^ 1);
      load(memory.value(place.stage), v_map, memory.value_full(place.stage), BLOCK_N, s.first_key + step * BLOCK_N,
           kv_head, s.batch);
      place.next();
    }
  }
}

template <class T, int kDim, bool kDropout>
__device__ __forceinline__ void attention_fwd_sm90_consume(const CUtensorMap& out_map, const Params& p,
                                                           const Schedule& schedule, Sm90ForwardMemory<kDim> memory,
                                                           int consumer) {
  using Shape = Sm90Forward<kDim>;
  constexpr int BLOCK_M = Shape::BLOCK_M, BLOCK_N = Shape::BLOCK_N;
  const int lane = threadIdx.x % 32, warp_row = 64 * consumer + threadIdx.x % 128 / 32 * 16;
  const float scale = p.scale * kLog2E;
  const int my_turn = 1 + consumer, other_turn = 2 - consumer;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  };

  if (consumer == 1) ptx::named_barrier_arrive(other_turn, 256);  // the first consumer goes first
  hopper::Place<Shape::kStages> place;
  uint32_t query_parity = 0;
  for (int index = blockIdx.x, count = schedule.count(); index < count; index += gridDim.x) {
    const Tile tile = schedule.tile(index);
    const Sequence s = sequence_of(p, tile.sequence);
    const Sight sight = sight_of(p, s.queries, s.keys);
    const int first_query = tile.block * BLOCK_M, row = first_query + warp_row + lane / 4;
    const Range steps = steps_of<BLOCK_N>(sight.keys_of({first_query, first_query + BLOCK_M}));

    float out[kDim / 2], largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, shrink[2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] = 0.0f;
    float scores[BLOCK_N / 2];
    uint32_t weights[BLOCK_N / 16][4];

    const Range upper = sight.keys_of({row, row + 1}), lower = sight.keys_of({row + 8, row + 9});
    const auto mask = [&](int step) {
      const int first_key = step * BLOCK_N, mine = first_query + 64 * consumer;
      if (sight.whole({mine, mine + 64}, {first_key, first_key + BLOCK_N})) return;
      mask_outside(scores, first_key, upper, lower, -INFINITY);
    };

    uint32_t kept[BLOCK_N / 64];
    const auto make_bits = [&](int step) {
      if constexpr (kDropout) {
        kept_bits<false>(kept, dropout_of(p, s), first_weight(p, s, tile.head), row, step * BLOCK_N);
      }
    };
    const auto drop_weights = [&] {
      if constexpr (kDropout) drop(scores, kept, 1.0f);
    };

    if (!steps.empty()) {
      ptx::mbarrier_wait(memory.query_full(), query_parity);
      query_parity ^= 1;
      ptx::mbarrier_wait(memory.key_full(place.stage), place.parity);
      ptx::named_barrier_sync(my_turn, 256);
      ptx::wgmma_fence();
      hopper::multiply_transposed<T, kDim, BLOCK_N>(scores, memory.query(), BLOCK_M, 64 * consumer,
                                                    memory.key(place.stage));
      ptx::wgmma_commit();
      ptx::named_barrier_arrive(other_turn, 256);
      make_bits(steps.end - 1);
      ptx::wgmma_wait<0>();  // the first scores
      ptx::keep(scores);
      release(memory.key_empty(place.stage));
      mask(steps.end - 1);
      softmax_step(scores, largest, sum, shrink, scale);
      drop_weights();
      hopper::pack_left<T>(weights, scores);
      hopper::Place<Shape::kStages> behind = place;  // V follows K by a step
      place.next();

      for (int step = steps.end - 2; step >= steps.begin; --step) {
        // Between the two products a wait, which is a loop that threads may leave one by one, would serialise them
        // (ptxas C7520); and V of the step before came before this K.
        ptx::mbarrier_wait(memory.key_full(place.stage), place.parity);
        ptx::mbarrier_wait(memory.value_full(behind.stage), behind.parity);
        ptx::named_barrier_sync(my_turn, 256);
        ptx::keep(scores), ptx::keep(out), ptx::keep(weights);
        ptx::wgmma_fence();  // of the loop
        hopper::multiply_transposed<T, kDim, BLOCK_N>(scores, memory.query(), BLOCK_M, 64 * consumer,
                                                      memory.key(place.stage));
        ptx::wgmma_commit();
        hopper::accumulate<T, kDim, BLOCK_N>(out, weights, memory.value(behind.stage));
        ptx::wgmma_commit();
        ptx::named_barrier_arrive(other_turn, 256);
        make_bits(step);
        ptx::wgmma_wait<1>();  // the scores
        ptx::keep(scores);
        release(memory.key_empty(place.stage));
        mask(step);
        softmax_step(scores, largest, sum, shrink, scale);
        drop_weights();
        ptx::wgmma_wait<0>();  // the sums
        ptx::keep(out);
        release(memory.value_empty(behind.stage));
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) out[i] *= shrink[i / 2 % 2];
        hopper::pack_left<T>(weights, scores);
        behind = place;
        place.next();
      }
      release(memory.query_empty());
      ptx::mbarrier_wait(memory.value_full(behind.stage), behind.parity);
      ptx::keep(out), ptx::keep(weights);
      ptx::wgmma_fence();
      hopper::accumulate<T, kDim, BLOCK_N>(out, weights, memory.value(behind.stage));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();  // the last sums
      ptx::keep(out);
      release(memory.value_empty(behind.stage));
    }

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = row_sum(sum[half]);
      inverse[half] = sum[half] == 0.0f ? 0.0f : (kDropout ? p.keep_factor : 1.0f) / sum[half];
      if (lane % 4 == 0 && row + 8 * half < s.queries) {
        const float lse = sum[half] == 0.0f ? -INFINITY : largest[half] * p.scale + logf(sum[half]);
        p.lse[(static_cast<int64_t>(s.batch) * p.heads + tile.head) * p.queries + s.first_query + row + 8 * half] = lse;
      }
    }
    // The copy engine cuts off what is past the end of the tensor, not of a sequence that others follow.
    if (p.first_queries == nullptr || first_query + warp_row + 16 <= s.queries) {
      store_out<T, kDim>(out_map, memory.out(), warp_row, out, inverse, s.first_query + (first_query + warp_row),
                         tile.head, s.batch);
      continue;
    }
    T* result = static_cast<T*>(p.out) + s.batch * p.out_stride.batch + tile.head * p.out_stride.head +
                s.first_query * p.out_stride.row;
    store_sums(result, p.out_stride.row, row, s.queries, out, inverse[0], inverse[1]);
  }
  if (lane == 0) ptx::bulk_wait<0>();                        // shared memory is read until then
  if (consumer == 0) ptx::named_barrier_sync(my_turn, 256);  // the turn that the other gave last
}

template <class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(Sm90Forward<kDim>::kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                              const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap out_map,
                              const __grid_constant__ Params p, const __grid_constant__ Schedule schedule) {
  using Shape = Sm90Forward<kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const Sm90ForwardMemory<kDim> memory{(ptx::shared_address(shared) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(memory.query_full(), 1);
    ptx::mbarrier_init(memory.query_empty(), 4 * Shape::kConsumers);  // a warp arrives when it is done
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      ptx::mbarrier_init(memory.key_full(stage), 1);
      ptx::mbarrier_init(memory.key_empty(stage), 4 * Shape::kConsumers);
      ptx::mbarrier_init(memory.value_full(stage), 1);
      ptx::mbarrier_init(memory.value_empty(stage), 4 * Shape::kConsumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are there
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    ptx::registers_decrease<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) attention_fwd_sm90_produce<kDim>(q_map, k_map, v_map, p, schedule, memory);
  } else {
    ptx::registers_increase<Shape::kConsumerRegisters>();
    attention_fwd_sm90_consume<T, kDim, kDropout>(out_map, p, schedule, memory, warpgroup - 1);
  }
}

}  // namespace fastgpt::attention
