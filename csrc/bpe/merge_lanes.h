// Many pieces merged at once: what merge.cpp chooses from, one function an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bpe/merge_table.h"

namespace fastgpt::bpe {

// What merges with what.
struct MergeRule {
  const uint32_t* byte_ids;    // 256
  const uint32_t* byte_ranks;  // 65536: the rank of joining two bytes, by the two as a little-endian number
  const MergeTable* pairs;
  const uint32_t* ids;  // by rank; null: the rank is the id
};

// A piece of 1 to 64 bytes.
struct MergeJob {
  static constexpr size_t kMaxBytes = 64;
  const uint8_t* bytes;
  uint32_t size;
  uint32_t count;  // out: of ids
  uint32_t* ids;   // room for one a byte
};

using MergeLanes = void (*)(const MergeRule& rule, MergeJob* jobs, size_t count);

// Null where the machine lacks the instructions (or the compiler targets another architecture).
MergeLanes avx2_merge_lanes();
MergeLanes avx512_merge_lanes();

}  // namespace fastgpt::bpe
