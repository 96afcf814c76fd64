#include "bpe/merge_table.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace fastgpt::bpe {
namespace {

constexpr uint64_t kEmpty = ~uint64_t{0};
constexpr int kSeeds = 8;  // multipliers tried before the table is doubled

}  // namespace

MergeTable::MergeTable(const std::vector<Pair>& pairs) {
  // A load of at most 0.85: a full table has no pilots for the last buckets.
  size_t slots = std::bit_ceil(std::max<size_t>(pairs.size() + pairs.size() / 6, 64));
  for (int attempt = 1; !build(pairs, slots); ++attempt) {
    multiplier_ *= 0xD1342543DE82EF95u;  // odd, as all multipliers
    if (attempt % kSeeds) continue;
    slots *= 2;
    if (slots > 64 * std::max<size_t>(pairs.size(), 64)) throw std::logic_error("merge table: a pair is there twice");
  }
}

// Places every bucket, the largest first, by the first pilot that hits free places only. False: one found none.
bool MergeTable::build(const std::vector<Pair>& pairs, size_t slots) {
  const size_t buckets = slots / 4;
  bucket_shift_ = 64 - std::countr_zero(buckets);
  slot_shift_ = 64 - std::countr_zero(slots);
  std::vector<uint32_t> begins(buckets + 1);
  for (const Pair& pair : pairs) ++begins[(hash(key_of(pair.left, pair.right)) >> bucket_shift_) + 1];
  size_t largest = 0;
  for (size_t i = 1; i <= buckets; ++i) {
    largest = std::max<size_t>(largest, begins[i]);
    begins[i] += begins[i - 1];
  }
  std::vector<uint32_t> members(pairs.size()), next(begins.begin(), begins.end() - 1);
  for (uint32_t i = 0; i < pairs.size(); ++i) {
    members[next[hash(key_of(pairs[i].left, pairs[i].right)) >> bucket_shift_]++] = i;
  }
  std::vector<std::vector<uint32_t>> by_size(largest + 1);
  for (uint32_t i = 0; i < buckets; ++i) by_size[begins[i + 1] - begins[i]].push_back(i);

  slots_ = Pages<uint64_t>(slots);
  std::fill(slots_.data(), slots_.data() + slots, kEmpty);
  pilots_.assign(buckets, 0);
  for (size_t size = largest; size; --size) {
    for (const uint32_t bucket : by_size[size]) {
      bool placed = false;
      for (uint32_t pilot = 0; pilot < 256 && !placed; ++pilot) {
        size_t done = 0;
        for (; done < size; ++done) {
          const Pair& pair = pairs[members[begins[bucket] + done]];
          const uint64_t key = key_of(pair.left, pair.right);
          uint64_t& slot = slots_[place(hash(key), pilot)];
          if (slot != kEmpty) break;
          slot = key << kIdBits | pair.rank;
        }
        placed = done == size;
        while (!placed && done) {  // takes back what this pilot has placed
          const Pair& pair = pairs[members[begins[bucket] + --done]];
          slots_[place(hash(key_of(pair.left, pair.right)), pilot)] = kEmpty;
        }
        if (placed) pilots_[bucket] = static_cast<uint8_t>(pilot);
      }
      if (!placed) return false;
    }
  }
  return true;
}

}  // namespace fastgpt::bpe
