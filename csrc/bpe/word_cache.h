// The cache of whole pre-tokens of one worker: bytes -> ids.
//
// A pre-token of up to 15 bytes has an entry of 32: the bytes with the length in the last, and up to three ids as they
// are written, or six packed. Entries stand where their hash says, else elsewhere in that cache line or in its seven
// neighbours; a new one finds an empty place or takes an old one's. One of up to 31 bytes has a line of its own, or one
// of seven more. More ids than fit go to an arena, as do pre-tokens of up to 1 KiB with their ids, found by a table of
// their own; when an arena is full, what points into it is forgotten. So memory is bounded: 26 MiB of tables and 20 MiB
// of arenas, taken as they are used.
//
// Finding is in steps, so that the lines of many pre-tokens can be on their way from memory at once, and so that the
// common case is a dozen instructions without a branch that depends on the text: `probe` makes the key and says which
// line to fetch, `find_quick` compares one entry, and `find` looks everywhere.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <vector>

#include "bpe/pages.h"
#include "bpe/vocabulary.h"

namespace fastgpt::bpe {

// How a key is made from the 16 bytes at a pre-token of n < 16 bytes: those that belong to it, and its length.
struct KeyForms {
  struct alignas(32) Form {
    uint64_t low_mask, high_mask, length;
  };
  Form of[16];
  constexpr KeyForms() : of() {
    for (uint64_t n = 0; n < 16; ++n) {
      of[n].low_mask = n >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * n)) - 1;
      of[n].high_mask = n <= 8 ? 0 : (uint64_t{1} << (8 * (n - 8))) - 1;
      of[n].length = n << 56;
    }
  }
};
inline constexpr KeyForms kKeyForms{};

class WordCache {
 public:
  static constexpr size_t kMaxBytes = 1024;  // of a pre-token that is kept
  static constexpr size_t kReadable = 32;    // bytes at a pre-token that `probe` may read
  static constexpr size_t kSlackIds = 8;     // ids that `find` may write beyond those it returns

  struct Probe {
    uint64_t low, high;  // the key of up to 15 bytes; of more a hash and kNoKey
    const void* line;    // the entry where it should stand
  };
  static constexpr bool is_word(size_t n) { return n <= 15; }

  WordCache() : words_(size_t{1} << kWordBits), long_(size_t{1} << kLongBits), far_(size_t{1} << kFarBits) {}

  // The probe of n >= 1 bytes at p, readable for kReadable bytes.
  Probe probe(const uint8_t* p, size_t n) const {
    if (__builtin_expect(!is_word(n), 0)) return probe_more(p, n);
    const KeyForms::Form& form = kKeyForms.of[n];
    Probe probe;
    std::memcpy(&probe.low, p, 8);
    std::memcpy(&probe.high, p + 8, 8);
    probe.low &= form.low_mask;
    probe.high = (probe.high & form.high_mask) | form.length;
    probe.line = words_.data() + (hash(probe.low, probe.high) >> (64 - kWordBits));
    return probe;
  }

  // Fetches what else finding more than 15 bytes reads, when the line of its probe is near.
  void fetch_rest(const Probe& probe, size_t n) const {
    if (n <= kLongBytes) {
      const Long& line = *place<Long>(probe, 0);
      if (line.count == kSpilled) __builtin_prefetch(arena_.data() + (line.ids[0] >> kSizeBits));
    } else if (n <= kMaxBytes) {
      const Far& entry = *place<Far>(probe, 0);
      if (!entry.used()) return;
      __builtin_prefetch(far_arena_.data() + entry.place);
      __builtin_prefetch(far_arena_.data() + entry.place + 64);
    }
  }

  // Copies the ids where the entry stands at its first place and has them as they are written, and moves out on. False:
  // ask `find`.
  static bool find_quick(const Probe& probe, uint32_t*& out) {
    const uint8_t* const entry = static_cast<const uint8_t*>(probe.line);  // of whatever kind; only a Word has the key
    uint64_t low, high;
    uint32_t count;
    std::memcpy(&low, entry + offsetof(Word, low), sizeof(low));
    std::memcpy(&high, entry + offsetof(Word, high), sizeof(high));
    std::memcpy(&count, entry + offsetof(Word, ids) + 3 * sizeof(uint32_t), sizeof(count));
    std::memcpy(out, entry + offsetof(Word, ids), sizeof(Word::ids));  // one access, the count with them
    if (__builtin_expect(((low ^ probe.low) | (high ^ probe.high)) != 0, 0)) return false;
    out += count;
    return true;
  }

  // Copies the ids of the n bytes at p that `probe` was made from to out and returns how many; 0: not there. Places
  // fill in the order in which they are looked at and never empty one by one, so an empty one ends the search.
  size_t find(const Probe& probe, const uint8_t* p, size_t n, uint32_t* out) const {
    if (is_word(n)) {
      for (size_t way = 0; way < kWordWays; ++way) {
        const Word& word = *place<Word>(probe, way);
        if (!word.used()) return 0;
        if (word.low != probe.low) continue;
        if (word.high == probe.high) {
          std::memcpy(out, word.ids, sizeof(word.ids));
          return word.ids[3];
        }
        if (word.high == (probe.high | kPacked)) return emit_packed(word, out);
      }
    } else if (n <= kLongBytes) {
      const LongKey key(p, n);
      for (size_t way = 0; way < kLongWays; ++way) {
        const Long& line = *place<Long>(probe, way);
        if (!line.used()) return 0;
        if (line.key != key) continue;
        if (line.count == kSpilled) return emit_spilled(line.ids[0], out);
        std::memcpy(out, line.ids, sizeof(line.ids));
        return line.count;
      }
    } else if (n <= kMaxBytes) {
      for (size_t way = 0; way < kFarWays; ++way) {
        const Far& entry = *place<Far>(probe, way);
        if (!entry.used()) return 0;
        if (entry.hash != probe.low || entry.bytes != n) continue;
        const uint8_t* const ids = far_arena_.data() + entry.place;
        if (std::memcmp(ids + entry.count * sizeof(uint32_t), p, n)) continue;
        std::memcpy(out, ids, entry.count * sizeof(uint32_t));
        return entry.count;
      }
    }
    return 0;
  }

  // Remembers the count >= 1 ids of a pre-token that is not there.
  void insert(const Probe& probe, const uint8_t* p, size_t n, const uint32_t* ids, size_t count) {
    if (is_word(n)) {
      Word word{probe.low, probe.high, {}};
      if (count <= 3) {
        std::copy(ids, ids + count, word.ids);
        word.ids[3] = static_cast<uint32_t>(count);
      } else {
        pack(ids, count, word);
      }
      free_place<Word, kWordWays>(probe) = word;
    } else if (n <= kLongBytes) {
      Long line{static_cast<uint32_t>(count), {}, LongKey(p, n)};
      if (count <= std::size(line.ids)) {
        std::copy(ids, ids + count, line.ids);
      } else {
        line.count = kSpilled;
        line.ids[0] = spill(ids, count);
      }
      free_place<Long, kLongWays>(probe) = line;
    } else if (n <= kMaxBytes) {
      const size_t ids_bytes = count * sizeof(uint32_t);
      if (far_arena_.size() + ids_bytes + n > kFarArenaBytes) {
        far_.zero();
        far_arena_.clear();
      }
      free_place<Far, kFarWays>(probe) = {probe.low, static_cast<uint32_t>(far_arena_.size()), static_cast<uint16_t>(n),
                                          static_cast<uint16_t>(count)};
      const uint8_t* const id_bytes = reinterpret_cast<const uint8_t*>(ids);
      far_arena_.insert(far_arena_.end(), id_bytes, id_bytes + ids_bytes);
      far_arena_.insert(far_arena_.end(), p, p + n);
    }
  }

  size_t memory_bytes() const {
    return words_.size() * sizeof(Word) + long_.size() * sizeof(Long) + far_.size() * sizeof(Far) +
           arena_.capacity() * sizeof(uint32_t) + far_arena_.capacity();
  }

 private:
  static constexpr int kWordBits = 19;  // entries of 32 bytes: 16 MiB
  static constexpr int kLongBits = 17;  // entries of 64 bytes: 8 MiB
  static constexpr int kFarBits = 17;   // entries of 16 bytes: 2 MiB
  static constexpr size_t kWordWays = 16, kLongWays = 8, kFarWays = 8;
  static constexpr size_t kFarArenaBytes = size_t{16} << 20;
  static constexpr size_t kArenaIds = size_t{1} << 20;
  static constexpr size_t kLongBytes = 31;
  static constexpr uint64_t kNoKey = ~uint64_t{0};  // what no entry has where a Word has the key's second half
  static constexpr uint32_t kSpilled = ~uint32_t{0};
  static constexpr int kSizeBits = 6;  // of a number of ids in the arena: at most 31, as there are no more bytes
  static constexpr uint64_t kPacked = uint64_t{1} << 63;  // lengths leave this bit free
  static constexpr int kIdBits = 20;

  struct alignas(32) Word {
    uint64_t low, high;  // the key; with kPacked in `high` there are more than three ids, packed
    uint32_t ids[4];     // the last is how many
    bool used() const { return high != 0; }
  };
  // The bytes of a pre-token of 16 to 31 bytes, its length in the last.
  struct LongKey {
    uint64_t words[4];
    LongKey() = default;
    LongKey(const uint8_t* p, size_t n) {
      std::memcpy(words, p, sizeof(words));
      words[2] &= kKeyForms.of[n - 16].low_mask;
      words[3] = (words[3] & kKeyForms.of[n - 16].high_mask) | uint64_t{n} << 56;
    }
    bool operator==(const LongKey& other) const {
      uint64_t differs = 0;
      for (int i = 0; i < 4; ++i) differs |= words[i] ^ other.words[i];
      return !differs;
    }
  };
  struct alignas(64) Long {
    uint32_t count;  // 0: empty; kSpilled: the place in the arena is in ids[0]
    uint32_t ids[7];
    LongKey key;
    bool used() const { return count != 0; }
  };
  struct Far {
    uint64_t hash;
    uint32_t place;         // of the ids in the arena, the pre-token's bytes after them
    uint16_t bytes, count;  // bytes 0: empty
    bool used() const { return bytes != 0; }
  };
  static_assert(sizeof(Word) == 32 && sizeof(Long) == 64 && sizeof(Far) == 16);

  Probe probe_more(const uint8_t* p, size_t n) const {
    static constexpr Word kEmpty{};
    if (n > kMaxBytes) return {0, kNoKey, &kEmpty};
    if (n > kLongBytes) {
      const uint64_t hashed = hash_bytes(p, n);
      return {hashed, kNoKey, far_.data() + (hashed >> (64 - kFarBits) & ~uint64_t{1})};
    }
    const LongKey key(p, n);
    const uint64_t hashed = hash(key.words[0] ^ key.words[2] * 5, key.words[1] ^ key.words[3]);
    return {hashed, kNoKey, long_.data() + (hashed >> (64 - kLongBits))};
  }

  // Another place for the entry of a probe: tables begin at a large page, so this stays in a group of lines.
  template <class Entry>
  static const Entry* place(const Probe& probe, size_t way) {
    return reinterpret_cast<const Entry*>(reinterpret_cast<uintptr_t>(probe.line) ^ way * sizeof(Entry));
  }

  // The first empty place, or that of an entry which has to go.
  template <class Entry, size_t kWays>
  Entry& free_place(const Probe& probe) {
    size_t way = 0;
    while (way < kWays && place<Entry>(probe, way)->used()) ++way;
    return *const_cast<Entry*>(place<Entry>(probe, way < kWays ? way : ++evictions_ % kWays));
  }

  static uint64_t hash(uint64_t low, uint64_t high) { return low * 0x9E3779B97F4A7C15u + high * 0xC2B2AE3D27D4EB4Fu; }

  // Puts ids into the arena; returns their place and number.
  uint32_t spill(const uint32_t* ids, size_t count) {
    if (arena_.size() + count > kArenaIds) {
      words_.zero();
      long_.zero();
      arena_.clear();
    }
    const size_t at = arena_.size();
    arena_.insert(arena_.end(), ids, ids + count);
    return static_cast<uint32_t>(at << kSizeBits | count);
  }

  size_t emit_spilled(uint32_t place, uint32_t* out) const {
    const size_t count = place & ((1u << kSizeBits) - 1);
    std::memcpy(out, arena_.data() + (place >> kSizeBits), count * sizeof(uint32_t));
    return count;
  }

  // More than three ids in a Word's two numbers: up to six of kIdBits from bit 4 on of each, and how many in the first
  // one's lowest bits; or 0 there, and above it where they are in the arena.
  void pack(const uint32_t* ids, size_t count, Word& word) {
    uint64_t numbers[2] = {count, 0};
    if (count <= 6 && std::all_of(ids, ids + count, [](uint32_t id) { return id < 1u << kIdBits; })) {
      for (size_t i = 0; i < count; ++i) numbers[i / 3] |= uint64_t{ids[i]} << (4 + kIdBits * (i % 3));
    } else {
      numbers[0] = uint64_t{spill(ids, count)} << 4;
    }
    std::memcpy(word.ids, numbers, sizeof(numbers));
    word.high |= kPacked;
  }
  size_t emit_packed(const Word& word, uint32_t* out) const {
    uint64_t numbers[2];
    std::memcpy(numbers, word.ids, sizeof(numbers));
    const size_t count = numbers[0] & 15;
    if (!count) return emit_spilled(static_cast<uint32_t>(numbers[0] >> 4), out);
    for (size_t i = 0; i < 6; ++i) {
      out[i] = static_cast<uint32_t>(numbers[i / 3] >> (4 + kIdBits * (i % 3)) & ((1u << kIdBits) - 1));
    }
    return count;
  }

  Pages<Word> words_;
  Pages<Long> long_;
  Pages<Far> far_;
  std::vector<uint8_t> far_arena_;
  std::vector<uint32_t> arena_;
  size_t evictions_ = 0;
};

}  // namespace fastgpt::bpe
