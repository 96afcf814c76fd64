// How often each pre-token occurred: an open-addressing table for pre-tokens of up to 15 bytes (two words hold bytes
// and length) and a standard one for longer ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bpe/vocabulary.h"

namespace fastgpt::bpe {

class WordCounts {
 public:
  WordCounts() : table_(size_t{1} << 12) {}

  // Counts n bytes at p, `times` times. readable: how many bytes may be read from p on, at least n.
  void add(const uint8_t* p, size_t n, size_t readable, uint64_t times) {
    if (n > 15) {
      const std::string_view word(reinterpret_cast<const char*>(p), n);
      const auto found = long_.find(word);
      if (found != long_.end()) {
        found->second += times;
      } else {
        long_.emplace(word, times);
      }
      return;
    }
    uint8_t copy[16] = {};
    if (readable < 16) {
      std::memcpy(copy, p, n);
      p = copy;
    }
    const uint64_t low = load_upto8(p, n);
    const uint64_t high = (n > 8 ? load_upto8(p + 8, n - 8) : 0) | uint64_t{n} << 56;
    add_short(low, high, times);
  }

  // Calls visit(word, times) for every word.
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (const Entry& entry : table_) {
      if (!entry.times) continue;
      char bytes[16];
      std::memcpy(bytes, &entry.low, 8);
      std::memcpy(bytes + 8, &entry.high, 8);
      visit(std::string_view(bytes, entry.high >> 56), entry.times);
    }
    for (const auto& [word, times] : long_) visit(std::string_view(word), times);
  }

  void add_all(const WordCounts& other) {
    for (const Entry& entry : other.table_) {
      if (entry.times) add_short(entry.low, entry.high, entry.times);
    }
    for (const auto& [word, times] : other.long_) long_[word] += times;
  }

  size_t size() const { return used_ + long_.size(); }

 private:
  struct Entry {
    uint64_t low, high, times;  // times 0: empty
  };
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view word) const {
      return hash_bytes(reinterpret_cast<const uint8_t*>(word.data()), word.size());
    }
  };
  struct Equal {
    using is_transparent = void;
    bool operator()(std::string_view a, std::string_view b) const { return a == b; }
  };

  void add_short(uint64_t low, uint64_t high, uint64_t times) {
    size_t at = mix(low ^ mix(high)) & (table_.size() - 1);
    for (; table_[at].times; at = (at + 1) & (table_.size() - 1)) {
      if (table_[at].low == low && table_[at].high == high) {
        table_[at].times += times;
        return;
      }
    }
    table_[at] = {low, high, times};
    if (++used_ * 2 > table_.size()) grow();
  }

  void grow() {
    std::vector<Entry> old(table_.size() * 2);
    old.swap(table_);
    for (const Entry& entry : old) {
      if (!entry.times) continue;
      size_t at = mix(entry.low ^ mix(entry.high)) & (table_.size() - 1);
      while (table_[at].times) at = (at + 1) & (table_.size() - 1);
      table_[at] = entry;
    }
  }

  std::vector<Entry> table_;
  size_t used_ = 0;
  std::unordered_map<std::string, uint64_t, Hash, Equal> long_;
};

}  // namespace fastgpt::bpe
