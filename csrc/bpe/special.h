// Finds special tokens in text.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastgpt::bpe {

class SpecialFinder {
 public:
  struct Match {
    size_t begin, end;  // begin == npos: none
    uint32_t id;
  };
  static constexpr size_t npos = std::string_view::npos;

  SpecialFinder() = default;
  // tokens: not empty strings, each with its id.
  explicit SpecialFinder(std::vector<std::pair<std::string, uint32_t>> tokens) : tokens_(std::move(tokens)) {
    // Longest first, so that of two tokens at one place the longer one is found.
    std::sort(tokens_.begin(), tokens_.end(), [](const auto& a, const auto& b) {
      return a.first.size() != b.first.size() ? a.first.size() > b.first.size() : a.first < b.first;
    });
    for (const auto& token : tokens_) starts_[static_cast<uint8_t>(token.first[0])] = true;
    one_start_ = std::count(starts_, starts_ + 256, true) == 1;
  }

  bool empty() const { return tokens_.empty(); }

  // The first occurrence of a token at or after `from`.
  Match find(std::string_view text, size_t from) const {
    if (tokens_.empty()) return {npos, npos, 0};
    for (size_t at = from; at < text.size(); ++at) {
      if (one_start_) {
        const void* const hit = std::memchr(text.data() + at, tokens_[0].first[0], text.size() - at);
        if (!hit) break;
        at = static_cast<size_t>(static_cast<const char*>(hit) - text.data());
      } else if (!starts_[static_cast<uint8_t>(text[at])]) {
        continue;
      }
      for (const auto& [token, id] : tokens_) {
        if (text.substr(at, token.size()) == token) return {at, at + token.size(), id};
      }
    }
    return {npos, npos, 0};
  }

 private:
  std::vector<std::pair<std::string, uint32_t>> tokens_;
  bool starts_[256] = {};
  bool one_start_ = false;
};

}  // namespace fastgpt::bpe
