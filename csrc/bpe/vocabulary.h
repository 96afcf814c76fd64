// A byte-level BPE vocabulary: token bytes <-> ids, looked up by content.
//
// A token's rank is its id: of the pairs of neighbours whose joined bytes are a token, the one with the lowest id is
// merged first, the leftmost of equals. That is tiktoken's rule; for ids that were handed out in the order of the
// merges, as minbpe and our trainer do, it gives what the list of merges gives. A vocabulary can instead carry the list
// itself (`merges`): then only listed pairs merge, in the list's order, and ids may be in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bpe/merge_lanes.h"
#include "bpe/merge_table.h"
#include "bpe/pages.h"

namespace fastgpt::bpe {

inline constexpr uint32_t kMaxId = (1u << 30) - 1;

// The first n <= 8 bytes at p as a number, the rest zero. p must be readable for 8 bytes.
inline uint64_t load_upto8(const uint8_t* p, size_t n) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return n >= 8 ? word : word & ((uint64_t{1} << (8 * n)) - 1);
}

inline uint64_t mix(uint64_t key) {
  key *= 0x9E3779B97F4A7C15u;
  return key ^ (key >> 32);
}

uint64_t hash_bytes(const uint8_t* p, size_t n);

struct Merge {
  uint32_t rank;
  uint32_t id;  // of the result
};

class Vocabulary {
 public:
  static constexpr size_t kPadding = 16;  // bytes that must be readable after any text given to find

  // tokens: (bytes, id), each once, every single byte among them. merges: empty, or pairs of ids in order of rank, each
  // with a joined token. Throws std::invalid_argument otherwise.
  Vocabulary(std::vector<std::pair<std::string, uint32_t>> tokens,
             const std::vector<std::pair<uint32_t, uint32_t>>& merges);

  // The id of the token with these bytes, or kNone. p[0, n + kPadding) must be readable.
  uint32_t find(const uint8_t* p, size_t n) const {
    if (n <= 2) {
      if (n == 2) return two_byte_ids_[p[0] | p[1] << 8];
      return n ? byte_ids_[p[0]] : kNone;
    }
    if (n > 8) return find_longer(p, n);
    const uint64_t key = load_upto8(p, n);
    const uint64_t hash = short_hash(key, n);
    if (!maybe(hash)) return kNone;
    for (size_t at = hash;; ++at) {
      const Short& entry = short_[at & (short_.size() - 1)];
      if (entry.key == key && entry.length == n) return entry.id;
      if (!entry.length) return kNone;
    }
  }

  // The same for bytes without padding.
  uint32_t find(std::string_view bytes) const;

  // The bytes of a token; empty when there is no such id.
  std::string_view bytes(uint32_t id) const {
    if (id >= slots_) return {};
    return {arena_.data() + offsets_[id], offsets_[id + 1] - offsets_[id]};
  }

  uint32_t byte_id(uint8_t byte) const { return byte_ids_[byte]; }
  bool has_merges() const { return has_merges_; }
  Merge find_merge(uint32_t left, uint32_t right) const;

  // All pairs that merge; empty in a vocabulary of more than about a million ids or merges.
  const MergeTable& pairs() const { return pairs_; }
  MergeRule merge_rule() const {
    return {byte_ids_.data(), byte_ranks_.data(), &pairs_, has_merges_ ? rank_ids_.data() : nullptr};
  }
  // Whether merging turns the bytes of every token into that token.
  bool merging_finds_tokens() const { return merging_finds_tokens_; }

  uint32_t slots() const { return slots_; }  // greatest id + 1
  size_t count() const { return count_; }
  size_t max_token_bytes() const { return max_token_bytes_; }

 private:
  static uint64_t short_hash(uint64_t key, size_t n) { return mix(key + n * 0xC2B2AE3D27D4EB4Fu); }
  uint32_t find_longer(const uint8_t* p, size_t n) const;  // more than 8 bytes

  struct Short {  // 3 to 8 bytes
    uint64_t key;
    uint32_t id;
    uint32_t length;  // 0: empty
  };
  struct Medium {  // 9 to 16 bytes
    uint64_t low, high;
    uint32_t id;
    uint32_t length;
  };
  struct Long {
    uint64_t hash;
    uint32_t id;
    uint32_t length;
  };

  std::string arena_;  // tokens in order of id, and kPadding more bytes
  std::vector<uint32_t> offsets_;
  uint32_t slots_ = 0;
  size_t count_ = 0;
  size_t max_token_bytes_ = 0;
  std::vector<uint32_t> byte_ids_;      // 256
  std::vector<uint32_t> two_byte_ids_;  // 65536, by the two bytes as a little-endian number
  bool maybe(uint64_t hash) const { return filter_[hash >> filter_shift_ >> 6] >> (hash >> filter_shift_ & 63) & 1; }

  // A bit for the hash of every token of 3 bytes or more, 8 to 16 bits a token: most pairs that merging asks about are
  // no token, and the filter, which stays in the cache, says so without a look at the tables.
  Pages<uint64_t> filter_;
  int filter_shift_ = 0;
  Pages<Short> short_;
  Pages<Medium> medium_;
  Pages<Long> long_;

  void make_pairs(const std::vector<MergeTable::Pair>& pairs);
  MergeTable pairs_;
  std::vector<uint32_t> byte_ranks_;  // 65536: of joining two bytes, by the two as a little-endian number
  std::vector<uint32_t> rank_ids_;    // with merges: what each makes
  bool has_merges_ = false, merging_finds_tokens_ = false;
  std::vector<uint64_t> pair_keys_;  // left << 32 | right; all ones: empty. Merges that pairs_ has no room for
  std::vector<Merge> pair_merges_;
};

}  // namespace fastgpt::bpe
