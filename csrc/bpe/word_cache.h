// The cache of whole pre-tokens of one worker: bytes -> ids.
//
// A pre-token of up to 7 bytes has an entry of 16 bytes: the bytes with the length in the last, and up to three ids.
// One of up to 15 bytes has an entry of 32: a key of 16 bytes made the same way, and up to six ids. Entries stand where
// their hash says, else elsewhere in that cache line or in the neighbouring one; a new one finds an empty place or
// takes an old one's. One of up to 31 bytes has a line of its own, or one of three more. More ids than fit go to an
// arena, as do pre-tokens of up to 1 KiB with their ids, found by a table of their own; when an arena is full, what
// points into it is forgotten. So memory is bounded: 22 MiB of tables and 20 MiB of arenas, taken as they are used.
//
// Finding is in steps, so that the lines of many pre-tokens can be on their way from memory at once, and so that the
// common case has no branch that depends on the text: `probe` makes the key and says which line to fetch, `find_quick`
// compares one entry, whatever its kind, and `find` looks everywhere.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bpe/pages.h"
#include "bpe/vocabulary.h"

namespace fastgpt::bpe {

// How a key is made from the first 16 bytes at a pre-token of n < 16 bytes, and where its entry may stand.
struct KeyForms {
  struct alignas(64) Form {
    uint64_t low_mask, high_mask;  // the bytes that belong to it
    uint64_t low_tag, high_tag;    // the length
    uint64_t wide;                 // all ones where the entry is one of 32 bytes
  };
  Form of[16];
  constexpr KeyForms() : of() {
    for (int n = 0; n < 16; ++n) {
      const uint64_t length = static_cast<uint64_t>(n) << 56;
      of[n].low_mask = n >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * n)) - 1;
      of[n].high_mask = n <= 8 ? 0 : (uint64_t{1} << (8 * (n - 8))) - 1;
      of[n].low_tag = n < 8 ? length : 0;
      of[n].high_tag = n < 8 ? 0 : length;
      of[n].wide = n < 8 ? 0 : ~uint64_t{0};
    }
  }
};
inline constexpr KeyForms kKeyForms{};

class WordCache {
 public:
  static constexpr size_t kMaxBytes = 31;  // of a cached pre-token
  static constexpr size_t kMaxFarBytes = 1024;
  static constexpr size_t kReadable = 32;  // bytes at a pre-token that probe may read
  static constexpr size_t kSlackIds = 8;   // ids that find may write beyond those it returns

  struct Probe {
    uint64_t low, high;    // the first 16 bytes of the key; high 0 in one of 8 bytes
    const uint64_t* line;  // the entry where it should stand
  };

  explicit WordCache(uint32_t id_limit)
      : inline_ids_(id_limit <= 1u << kIdBits),
        words_((kTinyBytes + kShortBytes) / sizeof(uint64_t)),
        long_(size_t{1} << kLongBits),
        far_(size_t{1} << kFarBits) {}

  // The probe of n bytes at p, 1 <= n <= kMaxBytes, readable for kReadable bytes.
  Probe probe(const uint8_t* p, size_t n) const {
    Probe probe;
    std::memcpy(&probe.low, p, 8);
    std::memcpy(&probe.high, p + 8, 8);
    if (__builtin_expect(n <= 15, 1)) {
      const KeyForms::Form& form = kKeyForms.of[n];
      probe.low = (probe.low & form.low_mask) | form.low_tag;
      probe.high = (probe.high & form.high_mask) | form.high_tag;
      // Twice as far in the second table, behind the first: no branch, as lengths are not foreseen.
      const size_t tiny = hash(probe.low, probe.high) >> (64 - kTinyBits) << 1;
      static_assert(kTinyBits == kShortBits);
      probe.line = words_.data() + tiny + ((tiny + kTinyBytes / sizeof(uint64_t)) & form.wide);
    } else {
      const Rest rest = rest_of(p, n);
      const uint64_t hashed = hash(probe.low ^ rest.low * 5, probe.high ^ rest.high);
      probe.line = reinterpret_cast<const uint64_t*>(long_.data() + (hashed >> (64 - kLongBits)));
    }
    return probe;
  }

  // For n <= 15: copies the ids where the entry stands at its first place and has no more than three; returns how many,
  // or 0: ask `find`.
  static size_t find_quick(const Probe& probe, size_t n, uint32_t* out) {
    // Both kinds by the same loads: in a tiny entry the second comparison repeats the first.
    const size_t last = n < 8 ? 0 : 1;
    const uint64_t expected = n < 8 ? probe.low : probe.high;
    const uint64_t ids = probe.line[last + 1];
    const uint64_t differs = (probe.line[0] ^ probe.low) | (probe.line[last] ^ expected) | (ids & 12);
    out[0] = static_cast<uint32_t>(ids >> 4 & kIdMask);
    out[1] = static_cast<uint32_t>(ids >> (4 + kIdBits) & kIdMask);
    out[2] = static_cast<uint32_t>(ids >> (4 + 2 * kIdBits));
    return differs ? 0 : ids & 3;
  }

  // Copies the ids of the pre-token that `probe` was made from to out and returns how many; 0: not there. Places fill
  // in the order in which they are looked at and never empty one by one, so an empty one ends the search.
  size_t find(const Probe& probe, const uint8_t* p, size_t n, uint32_t* out) const {
    if (n < 8) {
      for (size_t way = 0; way < kTinyWays; ++way) {
        const uint64_t* const entry = place(probe.line, way * 2 * sizeof(uint64_t));
        if (entry[0] == probe.low) return emit(entry[1], 0, out);
        if (!entry[1]) return 0;
      }
      return 0;
    }
    if (n <= 15) {
      for (size_t way = 0; way < kShortWays; ++way) {
        const uint64_t* const entry = place(probe.line, way * 4 * sizeof(uint64_t));
        if (entry[0] == probe.low && entry[1] == probe.high) return emit(entry[2], entry[3], out);
        if (!entry[2]) return 0;
      }
      return 0;
    }
    const Rest rest = rest_of(p, n);
    for (size_t way = 0; way < kLongWays; ++way) {
      const Long& line = *reinterpret_cast<const Long*>(place(probe.line, way * sizeof(Long)));
      if (!line.count) return 0;
      if (line.key[0] != probe.low || line.key[1] != probe.high) continue;
      if (line.key[2] != rest.low || line.key[3] != rest.high) continue;
      if (line.count == kSpilled) return emit_spilled(uint64_t{line.ids[0]} | uint64_t{line.ids[1]} << 32, out);
      std::memcpy(out, line.ids, sizeof(line.ids));
      return line.count;
    }
    return 0;
  }

  // Remembers the count >= 1 ids of a pre-token that is not there.
  void insert(const Probe& probe, const uint8_t* p, size_t n, const uint32_t* ids, size_t count) {
    if (n <= 15) {
      const size_t words = n < 8 ? 2 : 4, ways = n < 8 ? kTinyWays : kShortWays;
      uint64_t entry[4] = {probe.low, probe.high, 0, 0};
      uint64_t& first = entry[words / 2];
      if (inline_ids_ && count <= (n < 8 ? 3 : 6)) {
        first = pack(ids, count < 3 ? count : 3) | count;
        if (count > 3) entry[3] = pack(ids + 3, count - 3);
      } else {
        first = spill(ids, count) << 4 | kSpilled;
      }
      size_t way = 0;
      while (way < ways && place(probe.line, way * words * sizeof(uint64_t))[words / 2]) ++way;
      if (way == ways) way = ++evictions_ & (ways - 1);
      uint64_t* const at = const_cast<uint64_t*>(place(probe.line, way * words * sizeof(uint64_t)));
      for (size_t i = 0; i < words; ++i) at[i] = entry[i];
      return;
    }
    const Rest rest = rest_of(p, n);
    Long entry{{probe.low, probe.high, rest.low, rest.high}, static_cast<uint32_t>(count), {}};
    if (count <= 7) {
      std::memcpy(entry.ids, ids, count * sizeof(uint32_t));
    } else {
      const uint64_t place = spill(ids, count);
      entry.count = kSpilled;
      entry.ids[0] = static_cast<uint32_t>(place);
      entry.ids[1] = static_cast<uint32_t>(place >> 32);
    }
    auto line = [&](size_t way) {
      return reinterpret_cast<Long*>(const_cast<uint64_t*>(place(probe.line, way * sizeof(Long))));
    };
    size_t way = 0;
    while (way < kLongWays && line(way)->count) ++way;
    *line(way < kLongWays ? way : ++evictions_ % kLongWays) = entry;
  }

  // The same in one step for pre-tokens of more than kMaxBytes bytes, of which those up to kMaxFarBytes are kept.
  size_t find_far(const uint8_t* p, size_t n, uint32_t* out) const {
    const uint64_t hash = hash_bytes(p, n);
    const size_t home = hash >> (64 - kFarBits);
    for (size_t way = 0; way < kFarWays; ++way) {
      const Far& entry = far_.data()[home ^ way];
      if (!entry.bytes) return 0;
      if (entry.hash != hash || entry.bytes != n) continue;
      const uint8_t* const ids = far_arena_.data() + entry.place;
      if (std::memcmp(ids + entry.count * sizeof(uint32_t), p, n)) continue;
      std::memcpy(out, ids, entry.count * sizeof(uint32_t));
      return entry.count;
    }
    return 0;
  }

  void insert_far(const uint8_t* p, size_t n, const uint32_t* ids, size_t count) {
    if (n > kMaxFarBytes) return;
    const size_t ids_bytes = count * sizeof(uint32_t);
    if (far_arena_.size() + ids_bytes + n > kFarArenaBytes) {
      far_.zero();
      far_arena_.clear();
    }
    const uint64_t hash = hash_bytes(p, n);
    const size_t home = hash >> (64 - kFarBits);
    size_t way = 0;
    while (way < kFarWays && far_.data()[home ^ way].bytes) ++way;
    if (way == kFarWays) way = ++evictions_ % kFarWays;
    far_.data()[home ^ way] = {hash, static_cast<uint32_t>(far_arena_.size()), static_cast<uint16_t>(n),
                               static_cast<uint16_t>(count)};
    const uint8_t* const id_bytes = reinterpret_cast<const uint8_t*>(ids);
    far_arena_.insert(far_arena_.end(), id_bytes, id_bytes + ids_bytes);
    far_arena_.insert(far_arena_.end(), p, p + n);
  }

  size_t memory_bytes() const {
    return words_.size() * sizeof(uint64_t) + long_.size() * sizeof(Long) + far_.size() * sizeof(Far) +
           arena_.capacity() * sizeof(uint32_t) + far_arena_.capacity();
  }

 private:
  static constexpr int kIdBits = 20;
  static constexpr uint64_t kIdMask = (uint64_t{1} << kIdBits) - 1;
  static constexpr uint32_t kSpilled = 15;
  static constexpr int kTinyBits = 18;   // entries of 16 bytes: 4 MiB
  static constexpr int kShortBits = 18;  // entries of 32 bytes: 8 MiB
  static constexpr int kLongBits = 17;   // entries of 64 bytes: 8 MiB
  static constexpr int kFarBits = 17;
  static constexpr size_t kTinyBytes = size_t{16} << kTinyBits;
  static constexpr size_t kShortBytes = size_t{32} << kShortBits;
  static constexpr size_t kTinyWays = 8, kShortWays = 4, kFarWays = 8;  // entries in a pair of lines
  static constexpr size_t kLongWays = 4;
  static constexpr size_t kFarArenaBytes = size_t{16} << 20;
  static constexpr size_t kArenaIds = size_t{1} << 20;

  // The ids of an entry of up to 15 bytes: the count in bits 0 to 3 (0: empty), then three ids of kIdBits. Ids 4 to 6
  // in its fourth word, from bit 4 on. Count kSpilled: bits 4 to 9 the real count, above them the place in the arena.
  struct Far {
    uint64_t hash;
    uint32_t place;         // of the ids in the arena, the pre-token's bytes after them
    uint16_t bytes, count;  // bytes 0: empty
  };
  struct alignas(64) Long {
    uint64_t key[4];
    uint32_t count;
    uint32_t ids[7];
  };
  static_assert(sizeof(Long) == 64);

  // Bytes 16 to 30 of a long pre-token and its length.
  struct Rest {
    uint64_t low, high;
  };
  static Rest rest_of(const uint8_t* p, size_t n) {
    Rest rest;
    std::memcpy(&rest.low, p + 16, 8);
    std::memcpy(&rest.high, p + 24, 8);
    rest.low &= kKeyForms.of[n - 16].low_mask;
    rest.high = (rest.high & kKeyForms.of[n - 16].high_mask) | uint64_t{n} << 56;
    return rest;
  }

  // Another place for the entry of a line: tables begin at a large page, so this stays in a pair of lines.
  static const uint64_t* place(const uint64_t* line, size_t bytes) {
    return reinterpret_cast<const uint64_t*>(reinterpret_cast<uintptr_t>(line) ^ bytes);
  }

  static uint64_t hash(uint64_t low, uint64_t high) {
    return (low ^ std::rotr(high * 0xC2B2AE3D27D4EB4Fu, 17)) * 0x9E3779B97F4A7C15u;
  }

  static uint64_t pack(const uint32_t* ids, size_t count) {
    uint64_t packed = 0;
    for (size_t i = 0; i < count; ++i) packed |= uint64_t{ids[i]} << (4 + kIdBits * i);
    return packed;
  }

  // Count (at most 31, as there are no more bytes) in bits 0 to 5, the place in the arena above.
  uint64_t spill(const uint32_t* ids, size_t count) {
    if (arena_.size() + count > kArenaIds) {
      words_.zero();
      long_.zero();
      arena_.clear();
    }
    const uint64_t at = arena_.size();
    arena_.insert(arena_.end(), ids, ids + count);
    return at << 6 | count;
  }

  size_t emit(uint64_t ids, uint64_t more, uint32_t* out) const {
    const size_t count = ids & 15;
    if (count == kSpilled) return emit_spilled(ids >> 4, out);
    for (size_t i = 0; i < 3; ++i) {
      out[i] = static_cast<uint32_t>(ids >> (4 + kIdBits * i) & kIdMask);
      out[i + 3] = static_cast<uint32_t>(more >> (4 + kIdBits * i) & kIdMask);
    }
    return count;
  }

  size_t emit_spilled(uint64_t place, uint32_t* out) const {
    const size_t count = place & 63;
    std::memcpy(out, arena_.data() + (place >> 6), count * sizeof(uint32_t));
    return count;
  }

  bool inline_ids_;
  Pages<uint64_t> words_;  // the entries of up to 7 bytes, then those of up to 15
  Pages<Long> long_;
  Pages<Far> far_;
  std::vector<uint8_t> far_arena_;
  std::vector<uint32_t> arena_;
  size_t evictions_ = 0;
};

}  // namespace fastgpt::bpe
