// Byte-pair merging of one pre-token.
//
// Starts from single bytes and joins the neighbours of lowest rank, the leftmost of equals, until none can be joined.
// Pieces of up to 64 bytes: a scan for the minimum, several pieces in step (merge_lanes.inl). Long ones: sorted
// candidates, a heap for those that merging makes, and a linked list, O(n log n), so that a megabyte without a boundary
// is no trap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "bpe/merge_lanes.h"
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

// The same for many pieces of up to MergeJob::kMaxBytes bytes, which is faster than one after the other.
void merge_pieces(const Vocabulary& vocabulary, MergeJob* jobs, size_t count, MergeScratch& scratch);

// What merge_pieces chooses from, by the names of scanner_isa; null for one that the machine lacks. For tests.
MergeLanes merge_lanes_of(std::string_view isa);

// The pair that each token of two bytes or more is made from, in no order; the rank is the token's id. Merging by these
// pairs alone gives what merging by content gives, in any text and for any vocabulary: where two neighbours have the
// bytes of a token together, no merge has crossed the token's ends, so those inside went as in the token's bytes alone;
// and there only one state has two symbols. Tokens that never come to that state have no pair.
std::vector<MergeTable::Pair> pairs_of_tokens(const Vocabulary& vocabulary);

}  // namespace fastgpt::bpe
