// The order in which blocks take the tiles of attention: longest first, so that what is left at the end is short.
//
// Where all sequences have one length the order is plain arithmetic, on the host as on the device. Where they are
// packed their lengths are known on the device alone: a kernel of one block sorts the tiles by their steps and leaves a
// list.
#pragma once

#include <cstdint>

#include "cuda/attention_mask.cuh"

namespace fastgpt::attention {

// Packed sequences' offsets come from the caller unseen, so they are kept within the tensor.
struct Sequence {
  int batch, first_query, queries, first_key, keys;
};

__host__ __device__ inline Sequence sequence_of(const Params& p, int index) {
  if (p.first_queries == nullptr) return {index, 0, p.queries, 0, p.keys};
  const auto within = [](int x, int least, int most) { return x < least ? least : x > most ? most : x; };
  const int query = within(p.first_queries[index], 0, p.queries), key = within(p.first_keys[index], 0, p.keys);
  return {0, query, within(p.first_queries[index + 1], query, p.queries) - query, key,
          within(p.first_keys[index + 1], key, p.keys) - key};
}

struct Tile {
  int block, head, sequence;
};

// Heads go in sections whose streamed tensors fit the L2 cache together. In a section the last block comes first, or
// with `rising` the first: under a causal mask the last queries see the most keys, and the first keys are seen by the
// most queries.
struct Schedule {
  int blocks, heads, sequences;
  int section;  // heads of all sequences, 1 to heads * sequences
  bool rising = false;
  const int* plan = nullptr;  // of packed sequences: how many tiles a head, 0, then block and sequence of each

  __host__ __device__ int count() const { return (plan != nullptr ? plan[0] : blocks * sequences) * heads; }

  __host__ __device__ Tile tile(int index) const {
    if (plan != nullptr) {
      const int* entry = plan + 2 + 2 * (index / heads);
      return {entry[0], index % heads, entry[1]};
    }
    const int all = heads * sequences, first = index / (section * blocks) * section;
    const int width = all - first < section ? all - first : section, rest = index - first * blocks;
    const int row = first + rest % width, block = rest / width;
    return {rising ? block : blocks - 1 - block, row % heads, row / heads};
  }
};

// bytes: what a key head's blocks stream past; group: the heads of the schedule that share them.
inline Schedule longest_first(int blocks, int heads, int sequences, int64_t bytes, int group) {
  constexpr int64_t kCacheBytes = 32 << 20;  // of the 50 MB of an H100's L2
  const int64_t fit = kCacheBytes / bytes * group, all = static_cast<int64_t>(heads) * sequences;
  const int64_t section = fit < group ? group : fit;
  return {blocks, heads, sequences, static_cast<int>(section < all ? section : all)};
}

// The most tiles that packed sequences of `rows` rows together can have, and the numbers that their list takes.
inline int most_tiles(int rows, int sequences, int block) { return rows / block + sequences; }
inline int64_t plan_numbers(int rows, int sequences, int block) {
  return 2 + 2 * static_cast<int64_t>(most_tiles(rows, sequences, block));
}

// Steps of the walk of block `block`: over keys, or where kKeys its rows are keys over queries.
template <int kBlock, int kStep, bool kKeys>
__host__ __device__ int steps_of_tile(const Params& p, const Sequence& s, int block) {
  const Sight sight = sight_of(p, s.queries, s.keys);
  const Range rows = {block * kBlock, (block + 1) * kBlock};
  const Range steps = steps_of<kStep>(kKeys ? sight.queries_of(rows) : sight.keys_of(rows));
  return steps.end - steps.begin;
}

constexpr int kPlanThreads = 1024;

// Sorts by counting, up to 1,024 lengths; longer walks are told apart by their upper ten bits. Tiles of one length come
// in any order, which no result depends on. One block; a warp a sequence.
template <int kBlock, int kStep, bool kKeys>
__global__ void __launch_bounds__(kPlanThreads) attention_plan_kernel(const Params p, int* plan, int room) {
  __shared__ int count[kPlanThreads];
  __shared__ int longest;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  count[thread] = 0;
  if (thread == 0) longest = 0;
  __syncthreads();  // all zero
  const auto each_tile = [&](auto use) {
    for (int index = warp; index < p.sequences; index += kPlanThreads / 32) {
      const Sequence s = sequence_of(p, index);
      const int blocks = ((kKeys ? s.keys : s.queries) + kBlock - 1) / kBlock;
      for (int b = lane; b < blocks; b += 32) use(index, b, steps_of_tile<kBlock, kStep, kKeys>(p, s, b));
    }
  };
  each_tile([&](int, int, int steps) { atomicMax(&longest, steps); });
  __syncthreads();  // the longest is known
  int shift = 0;
  while (longest >> shift >= kPlanThreads) ++shift;
  const auto place = [&](int steps) { return kPlanThreads - 1 - (steps >> shift); };
  each_tile([&](int, int, int steps) { atomicAdd(&count[place(steps)], 1); });
  __syncthreads();  // counted
  for (int distance = 1; distance < kPlanThreads; distance *= 2) {
    const int before = thread >= distance ? count[thread - distance] : 0;
    __syncthreads();  // read by all
    count[thread] += before;
    __syncthreads();  // added
  }
  if (thread == 0) {
    const int all = count[kPlanThreads - 1];
    plan[0] = all < room ? all : room, plan[1] = 0;
  }
  const int end = count[thread], begin = thread > 0 ? count[thread - 1] : 0;
  __syncthreads();  // read
  count[thread] = end > begin ? begin : end;
  __syncthreads();  // where each length begins
  each_tile([&](int index, int b, int steps) {
    const int at = atomicAdd(&count[place(steps)], 1);
    if (at < room) plan[2 + 2 * at] = b, plan[3 + 2 * at] = index;
  });
}

}  // namespace fastgpt::attention
