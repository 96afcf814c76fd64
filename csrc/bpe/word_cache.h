// The cache of whole pre-tokens of one worker: bytes -> ids.
//
// Two tables of cache lines. A line of the first holds two pre-tokens of up to 15 bytes: 16 bytes of key (the bytes,
// the length in the last) and 16 of ids; what falls out of it goes to the neighbouring line, what falls out there is
// forgotten. A line of the second holds one pre-token of up to 31 bytes. More ids than fit go to an arena, as do
// pre-tokens of up to 1 KiB with their ids, found by a third table; when an arena is full, what points into it is
// forgotten. So memory is bounded: 12 MiB of tables and 8 MiB of arenas, taken as they are used.
//
// Finding is in two steps, so that the lines of many pre-tokens can be on their way from memory at once: `probe` makes
// the key and fetches the line, `find` looks.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "bpe/pages.h"
#include "bpe/vocabulary.h"

namespace fastgpt::bpe {

// What of 16 bytes belongs to a pre-token of n bytes, in two words; the last byte never does.
struct KeyMasks {
  struct {
    uint64_t low, high;
  } of[16];
  constexpr KeyMasks() : of() {
    for (int n = 0; n < 16; ++n) {
      of[n].low = n >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * n)) - 1;
      of[n].high = n <= 8 ? 0 : (uint64_t{1} << (8 * (n - 8))) - 1;
    }
  }
};
inline constexpr KeyMasks kKeyMasks{};

class WordCache {
 public:
  static constexpr size_t kMaxBytes = 31;  // of a cached pre-token
  static constexpr size_t kMaxFarBytes = 1024;
  static constexpr size_t kReadable = 32;  // bytes at a pre-token that probe may read
  static constexpr size_t kSlackIds = 8;   // ids that find may write beyond those it returns

  struct Probe {
    uint64_t low, high;  // the first 16 bytes of the key
    const void* line;
  };

  explicit WordCache(uint32_t id_limit)
      : inline_ids_(id_limit <= 1u << kIdBits),
        short_(2 << kShortBits),
        long_(size_t{1} << kLongBits),
        far_(size_t{1} << kFarBits) {}

  // The probe of n bytes at p, 1 <= n <= kMaxBytes, readable for kReadable bytes.
  Probe probe(const uint8_t* p, size_t n) const {
    Probe probe;
    std::memcpy(&probe.low, p, 8);
    std::memcpy(&probe.high, p + 8, 8);
    if (__builtin_expect(n <= 15, 1)) {
      probe.low &= kKeyMasks.of[n].low;
      probe.high = (probe.high & kKeyMasks.of[n].high) | uint64_t{n} << 56;
      probe.line = short_.data() + 2 * (hash(probe.low, probe.high) >> (64 - kShortBits));
    } else {
      const Rest rest = rest_of(p, n);
      probe.line = long_.data() + (hash(probe.low ^ rest.low * 5, probe.high ^ rest.high) >> (64 - kLongBits));
    }
    __builtin_prefetch(probe.line);
    return probe;
  }

  // Copies the ids of the pre-token that `probe` was made from to out and returns how many; 0: not there.
  size_t find(const Probe& probe, const uint8_t* p, size_t n, uint32_t* out) const {
    if (__builtin_expect(n <= 15, 1)) {
      const Short* const line = static_cast<const Short*>(probe.line);
      if (line[0].low == probe.low && line[0].high == probe.high) return emit(line[0], out);
      if (line[1].low == probe.low && line[1].high == probe.high) return emit(line[1], out);
      const Short* const next = neighbour(line);
      if (next[0].low == probe.low && next[0].high == probe.high) return emit(next[0], out);
      if (next[1].low == probe.low && next[1].high == probe.high) return emit(next[1], out);
      return 0;
    }
    const Long& line = *static_cast<const Long*>(probe.line);
    const Rest rest = rest_of(p, n);
    if (line.key[0] != probe.low || line.key[1] != probe.high || line.key[2] != rest.low || line.key[3] != rest.high) {
      return 0;
    }
    if (line.count == kSpilled) return emit_spilled(uint64_t{line.ids[0]} | uint64_t{line.ids[1]} << 32, out);
    std::memcpy(out, line.ids, sizeof(line.ids));
    return line.count;
  }

  // Remembers the count >= 1 ids of a pre-token.
  void insert(const Probe& probe, const uint8_t* p, size_t n, const uint32_t* ids, size_t count) {
    if (n <= 15) {
      Short entry{probe.low, probe.high, 0, 0};
      if (inline_ids_ && count <= 6) {
        entry.ids = pack(ids, count < 3 ? count : 3) | count;
        if (count > 3) entry.more = pack(ids + 3, count - 3);
      } else {
        entry.ids = spill(ids, count) << 4 | kSpilled;
      }
      Short* const line = const_cast<Short*>(static_cast<const Short*>(probe.line));
      Short* const next = const_cast<Short*>(neighbour(line));
      if (line[1].high) next[next[1].high && !next[0].high ? 0 : 1] = line[1];
      line[1] = line[0];
      line[0] = entry;
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
    *const_cast<Long*>(static_cast<const Long*>(probe.line)) = entry;
  }

  // The same in one step for pre-tokens of more than kMaxBytes bytes, of which those up to kMaxFarBytes are kept.
  size_t find_far(const uint8_t* p, size_t n, uint32_t* out) const {
    const uint64_t hash = hash_bytes(p, n);
    const Far& entry = far_.data()[hash >> (64 - kFarBits)];
    if (entry.hash != hash || entry.bytes != n) return 0;
    const uint8_t* const ids = far_arena_.data() + entry.place;
    if (std::memcmp(ids + entry.count * sizeof(uint32_t), p, n)) return 0;
    std::memcpy(out, ids, entry.count * sizeof(uint32_t));
    return entry.count;
  }

  void insert_far(const uint8_t* p, size_t n, const uint32_t* ids, size_t count) {
    if (n > kMaxFarBytes) return;
    const size_t ids_bytes = count * sizeof(uint32_t);
    if (far_arena_.size() + ids_bytes + n > kFarArenaBytes) {
      far_.zero();
      far_arena_.clear();
    }
    const uint64_t hash = hash_bytes(p, n);
    far_.data()[hash >> (64 - kFarBits)] = {hash, static_cast<uint32_t>(far_arena_.size()), static_cast<uint32_t>(n),
                                            static_cast<uint32_t>(count)};
    const uint8_t* const id_bytes = reinterpret_cast<const uint8_t*>(ids);
    far_arena_.insert(far_arena_.end(), id_bytes, id_bytes + ids_bytes);
    far_arena_.insert(far_arena_.end(), p, p + n);
  }

  size_t memory_bytes() const {
    return short_.size() * sizeof(Short) + long_.size() * sizeof(Long) + far_.size() * sizeof(Far) +
           arena_.capacity() * sizeof(uint32_t) + far_arena_.capacity();
  }

 private:
  static constexpr int kIdBits = 20;
  static constexpr uint64_t kIdMask = (uint64_t{1} << kIdBits) - 1;
  static constexpr uint32_t kSpilled = 15;
  static constexpr int kShortBits = 17;  // lines: 8 MiB
  static constexpr int kLongBits = 16;   // lines: 4 MiB
  static constexpr int kFarBits = 14;
  static constexpr size_t kFarArenaBytes = size_t{4} << 20;
  static constexpr size_t kArenaIds = size_t{1} << 20;

  // ids: the count in bits 0 to 3, then three ids of kIdBits; more: ids 4 to 6, from bit 4 on. Count kSpilled: bits 4
  // to 9 the real count, above them the place in the arena.
  struct Short {
    uint64_t low, high, ids, more;
  };
  struct Far {
    uint64_t hash;
    uint32_t place, bytes, count;  // place: of the ids in the arena, the pre-token's bytes after them; bytes 0: empty
  };
  struct alignas(64) Long {
    uint64_t key[4];
    uint32_t count;
    uint32_t ids[7];
  };
  static_assert(sizeof(Long) == 64 && sizeof(Short) == 32);

  // Bytes 16 to 30 of a long pre-token and its length.
  struct Rest {
    uint64_t low, high;
  };
  static Rest rest_of(const uint8_t* p, size_t n) {
    Rest rest;
    std::memcpy(&rest.low, p + 16, 8);
    std::memcpy(&rest.high, p + 24, 8);
    rest.low &= kKeyMasks.of[n - 16].low;
    rest.high = (rest.high & kKeyMasks.of[n - 16].high) | uint64_t{n} << 56;
    return rest;
  }

  static const Short* neighbour(const Short* line) {
    return reinterpret_cast<const Short*>(reinterpret_cast<uintptr_t>(line) ^ 64);
  }

  static uint64_t hash(uint64_t low, uint64_t high) {
    return (low ^ (high * 0xC2B2AE3D27D4EB4Fu >> 17 | high << 47)) * 0x9E3779B97F4A7C15u;
  }

  static uint64_t pack(const uint32_t* ids, size_t count) {
    uint64_t packed = 0;
    for (size_t i = 0; i < count; ++i) packed |= uint64_t{ids[i]} << (4 + kIdBits * i);
    return packed;
  }

  // Count (at most 31, as there are no more bytes) in bits 0 to 5, the place in the arena above.
  uint64_t spill(const uint32_t* ids, size_t count) {
    if (arena_.size() + count > kArenaIds) {
      short_.zero();
      long_.zero();
      arena_.clear();
    }
    const uint64_t at = arena_.size();
    arena_.insert(arena_.end(), ids, ids + count);
    return at << 6 | count;
  }

  // Writes three ids whatever the count is: cheaper than a branch on it.
  size_t emit(const Short& entry, uint32_t* out) const {
    const size_t count = entry.ids & 15;
    out[0] = static_cast<uint32_t>(entry.ids >> 4 & kIdMask);
    out[1] = static_cast<uint32_t>(entry.ids >> (4 + kIdBits) & kIdMask);
    out[2] = static_cast<uint32_t>(entry.ids >> (4 + 2 * kIdBits));
    if (__builtin_expect(count > 3, 0)) {
      if (count == kSpilled) return emit_spilled(entry.ids >> 4, out);
      out[3] = static_cast<uint32_t>(entry.more >> 4 & kIdMask);
      out[4] = static_cast<uint32_t>(entry.more >> (4 + kIdBits) & kIdMask);
      out[5] = static_cast<uint32_t>(entry.more >> (4 + 2 * kIdBits));
    }
    return count;
  }

  size_t emit_spilled(uint64_t place, uint32_t* out) const {
    const size_t count = place & 63;
    std::memcpy(out, arena_.data() + (place >> 6), count * sizeof(uint32_t));
    return count;
  }

  bool inline_ids_;
  Pages<Short> short_;
  Pages<Long> long_;
  Pages<Far> far_;
  std::vector<uint8_t> far_arena_;
  std::vector<uint32_t> arena_;
};

}  // namespace fastgpt::bpe
