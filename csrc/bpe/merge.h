// Byte-pair merging of one pre-token.
//
// Starts from single bytes and joins the neighbours of lowest rank, the leftmost of equals, until none can be joined.
// Short pieces: a scan for the minimum over packed arrays. Long ones: sorted candidates, a heap for those that merging
// makes, and a linked list, O(n log n), so that a megabyte without a boundary is no trap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bpe/vocabulary.h"

namespace fastgpt::bpe {

// Memory that long pieces use, kept between calls up to a bound.
struct MergeScratch {
  struct Node {
    uint32_t id, rank, joined;  // joined: the id that this and the next would become
    uint32_t next, previous;    // positions
  };
  std::vector<Node> nodes;
  std::vector<uint64_t> sorted, heap;  // rank << 32 | position
  std::vector<uint8_t> padded;
};

// Writes the ids of the n >= 1 bytes at p, which must be readable for n + Vocabulary::kPadding bytes, to out (room for
// n) and returns how many. n is below 2^32.
size_t merge_piece(const Vocabulary& vocabulary, const uint8_t* p, size_t n, uint32_t* out, MergeScratch& scratch);

}  // namespace fastgpt::bpe
