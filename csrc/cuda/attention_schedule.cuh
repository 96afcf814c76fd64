// The order in which a persistent grid takes the tiles of attention: plain arithmetic, on the host as on the device.
#pragma once

#include <cstdint>

namespace fastgpt::attention {

struct Tile {
  int block, head, batch;
};

// Heads go in sections whose keys and values fit the L2 cache together; in a section the last block of queries, which
// under a causal mask sees the most keys, comes first, so that what is left at the end is short.
struct Schedule {
  int blocks, heads, batch;
  int section;  // heads of all batches, 1 to heads * batch

  __host__ __device__ int count() const { return blocks * heads * batch; }

  __host__ __device__ Tile tile(int index) const {
    const int all = heads * batch, first = index / (section * blocks) * section;
    const int width = all - first < section ? all - first : section, rest = index - first * blocks;
    const int row = first + rest % width;
    return {blocks - 1 - rest / width, row % heads, row / heads};
  }
};

// bytes_of_keys: K and V of one key head; group: the query heads that share it.
inline Schedule longest_first(int blocks, int heads, int batch, int64_t bytes_of_keys, int group) {
  constexpr int64_t kCacheBytes = 32 << 20;  // of the 50 MB of an H100's L2
  const int64_t fit = kCacheBytes / bytes_of_keys * group, all = static_cast<int64_t>(heads) * batch;
  const int64_t section = fit < group ? group : fit;
  return {blocks, heads, batch, static_cast<int>(section < all ? section : all)};
}

}  // namespace fastgpt::attention
