// The gradients of attention_sm90.cuh on tensor copies and wgmma.
//
//   P = exp(scale S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q
//
// (arXiv 2205.14135, appendix B.4), delta the row sums of dO O; with dropout P^T in dV and dP are those of the kept
// weights, times the factor. A block keeps 128 rows and streams 64 columns a step past them. Where the rows are keys
// the columns are queries (of all query heads that share the key head), S and dP are made transposed, and P^T and dS^T
// feed the sums of dV and dK from registers. Two ways to dQ:
//   - kQueries, a kernel of its own whose rows are queries: seven products in all, no additions between blocks, the
//   same
//     bits every time, and no pass over an fp32 dQ, which is most of the time for short sequences;
//   - kAll: the kernel of the keys also writes dS^T to shared memory, and the two consumers multiply it by K, half of
//   D's
//     columns each, and add the result to dQ's fp32 sums by bulk reductions, in whatever order blocks get there: five
//     products (attention_sm90_grad_query.cuh).
//
// Switched off by default: it has not run on a GPU yet; see docs/notes/hopper.md.
#pragma once

#include "cuda/attention_sm80_backward.cuh"
#include "cuda/attention_sm90.cuh"
#include "cuda/attention_sm90_grad_query.cuh"

namespace fastgpt::attention {

enum class BackwardForm { kKeys, kQueries, kAll };  // dK and dV, dQ, all three

template <int kDim, BackwardForm kForm>
struct Sm90Backward {
  static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
  static constexpr int BLOCK_ROWS = 64 * kConsumers, BLOCK_COLUMNS = 64;
  static constexpr int kStages = kDim == 64 ? 4 : 2;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 240;
  static constexpr int kRowsBytes = BLOCK_ROWS * kDim * 2, kColumnsBytes = BLOCK_COLUMNS * kDim * 2;
  static constexpr int kVectorBytes = BLOCK_COLUMNS * 4;
  // Two tiles that stay, two a stage; of kAll two tiles of dS^T and a warpgroup's part of dQ each; lse and delta of the
  // columns a stage; barriers; 1024 to align.
  static constexpr int kScoresBytes = BLOCK_ROWS * BLOCK_COLUMNS * 2, kPartBytes = kSumRows * kDim / 2 * 4;
  static constexpr int kScores = 2 * kRowsBytes + 2 * kStages * kColumnsBytes;
  static constexpr int kParts = kScores + (kForm == BackwardForm::kAll ? 2 * kScoresBytes : 0);
  static constexpr int kVectors = kParts + (kForm == BackwardForm::kAll ? kConsumers * kPartBytes : 0);
  static constexpr int kBarriers = kVectors + 2 * kStages * kVectorBytes;
  static constexpr int kSharedBytes = 1024 + kBarriers + 8 * (1 + 2 * kStages);
};

// Adds a warpgroup's part of dQ to the sums at `to`, through its piece of shared memory, which the reduction before may
// still be reading. `barrier` + 1 is the warpgroup's own.
template <int kCount>
__device__ __forceinline__ void add_part(unsigned char* piece, const float (&part)[kCount], float* to, int barrier) {
  const int thread = threadIdx.x % 128;
  if (thread == 0) ptx::bulk_wait_read<0>();
  ptx::named_barrier_sync(barrier + 1, 128);  // free
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    reinterpret_cast<float4*>(piece)[128 * i + thread] =
        make_float4(part[4 * i], part[4 * i + 1], part[4 * i + 2], part[4 * i + 3]);
  }
  ptx::fence_proxy_async();                   // of dQ
  ptx::named_barrier_sync(barrier + 1, 128);  // written
  if (thread == 0) {
    ptx::bulk_add_float(to, ptx::shared_address(piece), kCount * 128 * 4);
    ptx::bulk_commit();
  }
}

// Which tiles a step takes: the head and the first row of the streamed tensors.
struct BackwardStep {
  int head, first;
};

// `row0` and `row1` map what stays (K, V or of kQueries Q, dO), `column0` and `column1` what streams (Q, dO or K, V).
template <class T, int kDim, BackwardForm kForm, bool kDropout>
__global__ void __launch_bounds__(Sm90Backward<kDim, kForm>::kThreads, 1)
    attention_bwd_sm90_kernel(const __grid_constant__ CUtensorMap row0, const __grid_constant__ CUtensorMap row1,
                              const __grid_constant__ CUtensorMap column0, const __grid_constant__ CUtensorMap column1,
                              const __grid_constant__ Params p, const __grid_constant__ Schedule schedule) {
  using Shape = Sm90Backward<kDim, kForm>;
  constexpr bool kKeys = kForm != BackwardForm::kQueries, kAll = kForm == BackwardForm::kAll;
  constexpr int kRows = Shape::BLOCK_ROWS, kColumns = Shape::BLOCK_COLUMNS, kStages = Shape::kStages;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t unaligned = ptx::shared_address(shared), base = (unaligned + 1023) & ~1023u;
  const auto column_tile = [&](int stage, int which) {
    return base + 2 * Shape::kRowsBytes + (2 * stage + which) * Shape::kColumnsBytes;
  };
  const auto full = [&](int stage) { return base + Shape::kBarriers + 8 + 16 * stage; };
  const auto empty = [&](int stage) { return full(stage) + 8; };
  const uint32_t rows_full = base + Shape::kBarriers;
  float* vectors = reinterpret_cast<float*>(shared + (base - unaligned) + Shape::kVectors);

  if (schedule.plan != nullptr && static_cast<int>(blockIdx.x) >= schedule.count())
    return;  // packed: fewer tiles than there may be
  const Tile tile = schedule.tile(blockIdx.x);
  const Sequence s = sequence_of(p, tile.sequence);
  const Sight sight = sight_of(p, s.queries, s.keys);
  const int group = p.heads / p.kv_heads, head = tile.head, first_row = tile.block * kRows;
  const auto seen_by = [&](Range rows) { return kKeys ? sight.queries_of(rows) : sight.keys_of(rows); };
  const Range blocks = steps_of<kColumns>(seen_by({first_row, first_row + kRows}));
  const int width = blocks.end - blocks.begin, steps = kKeys ? width * group : width;
  const auto place_of = [&](int step) -> BackwardStep {
    if (kKeys) return {head * group + step / width, (blocks.begin + step % width) * kColumns};
    return {head / group, (blocks.begin + step) * kColumns};
  };

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(rows_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), kKeys ? 33 : 1);  // the copies' thread, and the warp that brings lse and delta
      ptx::mbarrier_init(empty(stage), 4 * Shape::kConsumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are there
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  hopper::Place<kStages> place;

  if (warpgroup == 0) {
    ptx::registers_decrease<Shape::kProducerRegisters>();
    const auto load = [&](uint32_t tile, const CUtensorMap& map, uint32_t barrier, int rows, int first, int of_head) {
#pragma unroll
      for (int panel = 0; panel < kDim / 64; ++panel) {
        ptx::tensor_load_4d(tile + panel * rows * hopper::kPanelRowBytes, &map, barrier, 64 * panel, first, of_head,
                            s.batch);
      }
    };
    if (threadIdx.x == 0) {
      if (steps > 0) {
        ptx::mbarrier_arrive_expect(rows_full, 2 * Shape::kRowsBytes);
        const int first = (kKeys ? s.first_key : s.first_query) + first_row;
        load(base, row0, rows_full, kRows, first, head);
        load(base + Shape::kRowsBytes, row1, rows_full, kRows, first, head);
      }
      for (int step = 0; step < steps; ++step, place.next()) {
        const BackwardStep at = place_of(step);
        const int first = (kKeys ? s.first_query : s.first_key) + at.first;
        ptx::mbarrier_wait(empty(place.stage), place.parity ^ 1);
        ptx::mbarrier_arrive_expect(full(place.stage), 2 * Shape::kColumnsBytes);
        load(column_tile(place.stage, 0), column0, full(place.stage), kColumns, first, at.head);
        load(column_tile(place.stage, 1), column1, full(place.stage), kColumns, first, at.head);
      }
    } else if (kKeys && threadIdx.x / 32 == 1) {
      for (int step = 0; step < steps; ++step, place.next()) {
        const BackwardStep at = place_of(step);
        const int64_t from = (static_cast<int64_t>(s.batch) * p.heads + at.head) * p.queries + s.first_query;
        ptx::mbarrier_wait(empty(place.stage), place.parity ^ 1);
        for (int i = threadIdx.x % 32; i < kColumns; i += 32) {
          const int column = at.first + i;  // past the end lse is +inf, which makes the weights 0
          float* lse = vectors + 2 * kColumns * place.stage;
          lse[i] = column < s.queries ? p.lse[from + column] * kLog2E : INFINITY;
          lse[kColumns + i] = column < s.queries ? p.delta[from + column] : 0.0f;
        }
        ptx::mbarrier_arrive(full(place.stage));
      }
    }
    return;
  }

  ptx::registers_increase<Shape::kConsumerRegisters>();
  const int lane = threadIdx.x % 32, consumer_row = 64 * (warpgroup - 1);
  const int row = first_row + consumer_row + threadIdx.x % 128 / 32 * 16 + lane / 4;  // and the one 8 below
  const float scale = p.scale * kLog2E;
  float row_lse[2] = {0.0f, 0.0f}, row_delta[2] = {0.0f, 0.0f};
  if (!kKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = (static_cast<int64_t>(s.batch) * p.heads + head) * p.queries + s.first_query + row + 8 * half;
      row_lse[half] = row + 8 * half < s.queries ? p.lse[i] * kLog2E : INFINITY;
      row_delta[half] = row + 8 * half < s.queries ? p.delta[i] : 0.0f;
    }
  }
  float sum0[kDim / 2], sum1[kKeys ? kDim / 2 : 1];  // of dS and column0; of P and column1
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) sum0[i] = 0.0f;
#pragma unroll
  for (float& x : sum1) x = 0.0f;

  if (steps > 0) ptx::mbarrier_wait(rows_full, 0);
  for (int step = 0; step < steps; ++step, place.next()) {
    const BackwardStep at = place_of(step);
    const int first = at.first;
    const uint32_t tile0 = column_tile(place.stage, 0), tile1 = column_tile(place.stage, 1);
    const float* lse = vectors + 2 * kColumns * place.stage;
    const float* delta = lse + kColumns;
    float scores[kColumns / 2], ds[kColumns / 2];
    uint32_t weights[kColumns / 16][4], ds_left[kColumns / 16][4];
    uint32_t kept[kColumns / 64];
    if constexpr (kDropout) {  // before the products: their registers are wanted here
      kept_bits<kKeys>(kept, dropout_of(p, s), first_weight(p, s, kKeys ? at.head : head), row, first);
    }
    ptx::mbarrier_wait(full(place.stage), place.parity);
    ptx::wgmma_fence();  // before the scores
    hopper::multiply_transposed<T, kDim, kColumns>(scores, base, kRows, consumer_row, tile0);
    ptx::wgmma_commit();
    hopper::multiply_transposed<T, kDim, kColumns>(ds, base + Shape::kRowsBytes, kRows, consumer_row, tile1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the scores
    ptx::keep(scores);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      scores[i] = ptx::exp2_approx(scores[i] * scale - (kKeys ? lse[column] : row_lse[i / 2 % 2]));
    }
    const Range mine = {first_row + consumer_row, first_row + consumer_row + 64}, columns = {first, first + kColumns};
    if (!sight.whole(kKeys ? columns : mine, kKeys ? mine : columns)) {
      mask_outside(scores, first, seen_by({row, row + 1}), seen_by({row + 8, row + 9}), 0.0f);
    }
    ptx::wgmma_wait<0>();  // dP
    ptx::keep(ds);
    if constexpr (kDropout) drop(ds, kept, p.keep_factor);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      ds[i] = scores[i] * (ds[i] - (kKeys ? delta[column] : row_delta[i / 2 % 2]));
    }
    hopper::pack_left<T>(ds_left, ds);
    const uint32_t scores_tile = base + Shape::kScores + step % 2 * Shape::kScoresBytes;
    if constexpr (kAll) {  // two tiles: who writes one has met those who read it, at the barrier of the step between
      hopper::store_left(scores_tile, consumer_row + threadIdx.x % 128 / 32 * 16, ds_left);
      ptx::fence_proxy_async();  // of dS
      ptx::named_barrier_sync(1, 256);
    }
    ptx::keep(sum0), ptx::keep(ds_left);
    if (kKeys) {
      if constexpr (kDropout) drop(scores, kept, 1.0f);
      hopper::pack_left<T>(weights, scores);
      ptx::keep(sum1), ptx::keep(weights);
    }
    ptx::wgmma_fence();  // before the sums
    if constexpr (kKeys) hopper::accumulate<T, kDim, kColumns>(sum1, weights, tile1);
    hopper::accumulate<T, kDim, kColumns>(sum0, ds_left, tile0);
    float part[kAll ? kDim / 4 : 1];
    if constexpr (kAll) {
      hopper::multiply_left_transposed<T, kRows, kDim / 2>(part, scores_tile, base, (warpgroup - 1) * (kDim / 2));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();  // the sums
    ptx::keep(sum0);
    if (kKeys) ptx::keep(sum1);
    if (lane == 0) ptx::mbarrier_arrive(empty(place.stage));
    if constexpr (kAll) {
      ptx::keep(part);
      float* to = sums_of(p, first_piece(p, s, tile.sequence) + first / kSumRows, at.head, warpgroup - 1);
      add_part(shared + (base - unaligned) + Shape::kParts + (warpgroup - 1) * Shape::kPartBytes, part, to, warpgroup);
    }
  }

  if (kAll && threadIdx.x % 128 == 0) ptx::bulk_wait<0>();  // shared memory is read until then
  const auto store = [&](void* result, const Strides& by, const float (&sums)[kDim / 2], float factor) {
    T* matrix =
        static_cast<T*>(result) + s.batch * by.batch + head * by.head + (kKeys ? s.first_key : s.first_query) * by.row;
    store_sums(matrix, by.row, row, kKeys ? s.keys : s.queries, sums, factor, factor);
  };
  if constexpr (kKeys) {
    store(p.grad_key, p.grad_key_stride, sum0, p.scale);
    store(p.grad_value, p.grad_value_stride, sum1, kDropout ? p.keep_factor : 1.0f);
  } else {
    store(p.grad_query, p.grad_query_stride, sum0, p.scale);
  }
}

}  // namespace fastgpt::attention
