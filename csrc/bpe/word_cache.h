// The cache of whole pre-tokens of one worker: bytes -> up to 6 ids inline, more in an arena.
//
// A pre-token of n <= 7 bytes is one 64-bit key (its bytes, n in the top byte), one of n <= 15 bytes two words. Buckets
// fill one cache line: four short entries or two long ones. A new entry takes the first place of its bucket and pushes
// the others back, so the oldest falls out. When the arena is full, everything is forgotten.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "bpe/vocabulary.h"

namespace fastgpt::bpe {

class WordCache {
 public:
  static constexpr size_t kMaxBytes = 15;  // of a cached pre-token
  static constexpr size_t kMaxIds = 8;     // writes at most this many ids beyond what it returns
  static constexpr size_t kArenaIds = size_t{1} << 20;

  explicit WordCache(uint32_t id_limit) : inline_ids_(id_limit <= 1u << kIdBits) {
    short_ = allocate<Short>(4 * kShortBuckets);
    long_ = allocate<Long>(2 * kLongBuckets);
  }
  WordCache(const WordCache&) = delete;
  WordCache& operator=(const WordCache&) = delete;
  ~WordCache() {
    std::free(short_);
    std::free(long_);
  }

  // Copies the ids of a cached pre-token to out (room for its ids and kMaxIds more) and returns how many; 0: not there.
  // p is readable for 16 bytes, 1 <= n <= kMaxBytes.
  size_t find(const uint8_t* p, size_t n, uint32_t* out) const {
    if (n <= 7) {
      const uint64_t key = short_key(p, n);
      const Short* const bucket = short_ + short_bucket(key);
      for (int i = 0; i < 4; ++i) {
        if (bucket[i].key == key) return emit(bucket[i].ids, out);
      }
      return 0;
    }
    const uint64_t low = load_upto8(p, 8), high = long_high(p, n);
    const Long* const bucket = long_ + long_bucket(low, high);
    for (int i = 0; i < 2; ++i) {
      if (bucket[i].low == low && bucket[i].high == high) {
        const size_t count = emit(bucket[i].ids, out);
        if (count > 3) emit_more(bucket[i], count, out);
        return count;
      }
    }
    return 0;
  }

  void insert(const uint8_t* p, size_t n, const uint32_t* ids, size_t count) {
    if (n <= 7) {
      const uint64_t packed = inline_ids_ && count <= 3 ? pack(ids, count) | count : spill(ids, count);
      const uint64_t key = short_key(p, n);
      Short* const bucket = short_ + short_bucket(key);
      std::memmove(bucket + 1, bucket, 3 * sizeof(Short));
      bucket[0] = {key, packed};
      return;
    }
    uint64_t packed, more = 0;
    if (inline_ids_ && count <= 6) {
      packed = pack(ids, count < 3 ? count : 3) | count;
      if (count > 3) more = pack(ids + 3, count - 3);
    } else {
      packed = spill(ids, count);
    }
    const uint64_t low = load_upto8(p, 8), high = long_high(p, n);
    Long* const bucket = long_ + long_bucket(low, high);
    bucket[1] = bucket[0];
    bucket[0] = {low, high, packed, more};
  }

  size_t memory_bytes() const {
    return 4 * kShortBuckets * sizeof(Short) + 2 * kLongBuckets * sizeof(Long) + arena_.capacity() * sizeof(uint32_t);
  }

 private:
  static constexpr int kIdBits = 20;
  static constexpr uint64_t kIdMask = (uint64_t{1} << kIdBits) - 1;
  static constexpr uint64_t kSpilled = 15;
  static constexpr size_t kShortBuckets = size_t{1} << 15;
  static constexpr size_t kLongBuckets = size_t{1} << 16;

  // ids: bits 0 to 3 hold the count, then three ids of kIdBits; count kSpilled: bits 4 to 31 the count, 32 to 63 the
  // place in the arena.
  struct Short {
    uint64_t key, ids;
  };
  struct Long {
    uint64_t low, high, ids, more;  // more: ids 4 to 6, from bit 4 on
  };

  template <class T>
  static T* allocate(size_t n) {
    // Zeroed by the kernel page by page, at first touch.
    void* const memory = std::aligned_alloc(4096, n * sizeof(T));
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0, n * sizeof(T));
    return static_cast<T*>(memory);
  }

  static uint64_t short_key(const uint8_t* p, size_t n) { return load_upto8(p, n) | uint64_t{n} << 56; }
  static uint64_t long_high(const uint8_t* p, size_t n) { return load_upto8(p + 8, n - 8) | uint64_t{n} << 56; }
  static size_t short_bucket(uint64_t key) { return (key * 0x9E3779B97F4A7C15u >> (64 - 15)) * 4; }
  static size_t long_bucket(uint64_t low, uint64_t high) {
    const uint64_t mixed = (low ^ (high * 0xC2B2AE3D27D4EB4Fu)) * 0x9E3779B97F4A7C15u;
    return (mixed >> (64 - 16)) * 2;
  }

  static uint64_t pack(const uint32_t* ids, size_t count) {
    uint64_t packed = 0;
    for (size_t i = 0; i < count; ++i) packed |= uint64_t{ids[i]} << (4 + kIdBits * i);
    return packed;
  }

  uint64_t spill(const uint32_t* ids, size_t count) {
    if (arena_.size() + count > kArenaIds) {
      std::memset(short_, 0, 4 * kShortBuckets * sizeof(Short));
      std::memset(long_, 0, 2 * kLongBuckets * sizeof(Long));
      arena_.clear();
    }
    const uint64_t at = arena_.size();
    arena_.insert(arena_.end(), ids, ids + count);
    return kSpilled | count << 4 | at << 32;
  }

  // Writes three ids whatever the count is: cheaper than a branch on it.
  size_t emit(uint64_t ids, uint32_t* out) const {
    const size_t count = ids & 15;
    if (__builtin_expect(count == kSpilled, 0)) {
      const size_t spilled = static_cast<uint32_t>(ids) >> 4;
      std::memcpy(out, arena_.data() + (ids >> 32), spilled * sizeof(uint32_t));
      return spilled;
    }
    out[0] = static_cast<uint32_t>(ids >> 4 & kIdMask);
    out[1] = static_cast<uint32_t>(ids >> (4 + kIdBits) & kIdMask);
    out[2] = static_cast<uint32_t>(ids >> (4 + 2 * kIdBits));
    return count;
  }

  void emit_more(const Long& entry, size_t, uint32_t* out) const {
    if ((entry.ids & 15) == kSpilled) return;
    out[3] = static_cast<uint32_t>(entry.more >> 4 & kIdMask);
    out[4] = static_cast<uint32_t>(entry.more >> (4 + kIdBits) & kIdMask);
    out[5] = static_cast<uint32_t>(entry.more >> (4 + 2 * kIdBits));
  }

  bool inline_ids_;
  Short* short_;
  Long* long_;
  std::vector<uint32_t> arena_;
};

}  // namespace fastgpt::bpe
