// The pairs of ids that merge, with their ranks: a table of 8 bytes a pair that is looked up without a branch.
//
// Merging asks about pairs of neighbours all the time, finds half of them, and each answer decides what is asked next:
// a branch that is not foreseen costs more than the look-up. So the table is a perfect hash: a first hash says which
// byte of `pilots_` to add, chosen at construction such that no two pairs share a place.
//
// C. Pibiri, R. Trani: PTHash, revisiting FCH minimal perfect hashing (arXiv 2104.10402), without the minimality.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bpe/pages.h"

namespace fastgpt::bpe {

inline constexpr uint32_t kNone = 0xFFFFFFFFu;  // no token; greater than every rank

class MergeTable {
 public:
  static constexpr int kIdBits = 20;
  static constexpr uint32_t kNoId = (1u << kIdBits) - 1;  // an id that no pair has; ids and ranks are below it

  struct Pair {
    uint32_t left, right, rank;
  };

  MergeTable() = default;
  // pairs: each (left, right) once, all three numbers below kNoId.
  explicit MergeTable(const std::vector<Pair>& pairs);

  bool empty() const { return slots_.size() == 0; }

  // The rank of joining two ids, or kNone. Ids are up to kNoId.
  uint32_t rank(uint32_t left, uint32_t right) const {
    const uint64_t key = key_of(left, right);
    const uint64_t entry = slots_.data()[place(key)];
    return entry >> kIdBits == key ? static_cast<uint32_t>(entry) & kNoId : kNone;
  }

 private:
  static uint64_t key_of(uint32_t left, uint32_t right) { return uint64_t{left} << kIdBits | right; }
  uint64_t hash(uint64_t key) const { return key * multiplier_; }
  size_t place(uint64_t key) const {
    const uint64_t h = hash(key);
    return place(h, pilots_.data()[h >> bucket_shift_]);
  }
  size_t place(uint64_t h, uint64_t pilot) const { return (h ^ pilot) * 0xC2B2AE3D27D4EB4Fu >> slot_shift_; }
  bool build(const std::vector<Pair>& pairs, size_t slots);

  Pages<uint64_t> slots_;  // left, right and rank in kIdBits each; all ones: empty
  std::vector<uint8_t> pilots_;
  uint64_t multiplier_ = 0x9E3779B97F4A7C15u;
  int bucket_shift_ = 63, slot_shift_ = 63;
};

}  // namespace fastgpt::bpe
