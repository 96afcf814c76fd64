#include "bpe/vocabulary.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

#include "bpe/merge.h"

namespace fastgpt::bpe {
namespace {

constexpr uint64_t kEmptyPair = ~uint64_t{0};

// Room for n entries at a load of at most one half; a power of two.
size_t table_size(size_t n) { return std::bit_ceil(std::max<size_t>(2 * n, 16)); }

uint64_t medium_hash(uint64_t low, uint64_t high, size_t n) { return mix(low ^ mix(high + n)); }

std::string quoted(const std::string& bytes) {
  static const char digits[] = "0123456789abcdef";
  std::string out = "b\"";
  for (const unsigned char c : bytes) {
    if (c >= 0x20 && c < 0x7F && c != '"' && c != '\\') {
      out += static_cast<char>(c);
    } else {
      out += {'\\', 'x', digits[c >> 4], digits[c & 15]};
    }
  }
  return out + '"';
}

}  // namespace

uint64_t hash_bytes(const uint8_t* p, size_t n) {
  uint64_t hash = n * 0xC2B2AE3D27D4EB4Fu;
  for (; n > 8; p += 8, n -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    hash = mix(hash ^ word);
  }
  uint64_t word = 0;
  std::memcpy(&word, p, n);
  return mix(hash ^ word);
}

Vocabulary::Vocabulary(std::vector<std::pair<std::string, uint32_t>> tokens,
                       const std::vector<std::pair<uint32_t, uint32_t>>& merges)
    : count_(tokens.size()), byte_ids_(256, kNone), two_byte_ids_(65536, kNone) {
  std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  size_t total = 0, shorts = 0, mediums = 0, longs = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto& [bytes, id] = tokens[i];
    if (bytes.empty()) throw std::invalid_argument("token " + std::to_string(id) + " is empty");
    if (id > kMaxId) throw std::invalid_argument("token id " + std::to_string(id) + " is above the limit of 2^30 - 1");
    if (i && tokens[i - 1].second == id) throw std::invalid_argument("two tokens have the id " + std::to_string(id));
    total += bytes.size();
    max_token_bytes_ = std::max(max_token_bytes_, bytes.size());
    (bytes.size() <= 8 ? shorts : bytes.size() <= 16 ? mediums : longs) += 1;
  }
  if (total > kMaxId) throw std::invalid_argument("the tokens have more than 2^30 bytes together");
  slots_ = tokens.empty() ? 0 : tokens.back().second + 1;
  // Ids far apart would make the table of offsets larger than any real vocabulary's.
  if (slots_ > (1u << 24) && slots_ > 16 * tokens.size()) {
    throw std::invalid_argument("token id " + std::to_string(slots_ - 1) + " is out of proportion to " +
                                std::to_string(tokens.size()) + " tokens");
  }

  short_ = Pages<Short>(table_size(shorts));  // zeros: empty
  medium_ = Pages<Medium>(table_size(mediums));
  long_ = Pages<Long>(table_size(longs));
  const size_t filter_bits = std::bit_ceil(std::max<size_t>(8 * tokens.size(), 64));
  filter_ = Pages<uint64_t>(filter_bits / 64);
  filter_shift_ = 64 - std::countr_zero(filter_bits);
  auto remember = [&](uint64_t hash) {
    const uint64_t bit = hash >> filter_shift_;
    filter_[bit >> 6] |= uint64_t{1} << (bit & 63);
    return hash;
  };
  arena_.reserve(total + kPadding);
  offsets_.reserve(slots_ + 1);
  for (const auto& [bytes, id] : tokens) {
    while (offsets_.size() <= id) offsets_.push_back(static_cast<uint32_t>(arena_.size()));
    arena_ += bytes;
  }
  offsets_.push_back(static_cast<uint32_t>(arena_.size()));
  arena_.append(kPadding, '\0');

  for (const auto& [bytes, id] : tokens) {
    const size_t n = bytes.size();
    const uint8_t* p = reinterpret_cast<const uint8_t*>(arena_.data()) + offsets_[id];
    if (find(p, n) != kNone) {
      throw std::invalid_argument("the token " + quoted(bytes) + " is there twice, as " + std::to_string(find(p, n)) +
                                  " and as " + std::to_string(id));
    }
    if (n == 1) {
      byte_ids_[p[0]] = id;
    } else if (n == 2) {
      two_byte_ids_[p[0] | p[1] << 8] = id;
    } else if (n <= 8) {
      const uint64_t key = load_upto8(p, n);
      size_t at = remember(short_hash(key, n)) & (short_.size() - 1);
      while (short_[at].length) at = (at + 1) & (short_.size() - 1);
      short_[at] = {key, id, static_cast<uint32_t>(n)};
    } else if (n <= 16) {
      const uint64_t low = load_upto8(p, 8), high = load_upto8(p + 8, n - 8);
      size_t at = remember(medium_hash(low, high, n)) & (medium_.size() - 1);
      while (medium_[at].length) at = (at + 1) & (medium_.size() - 1);
      medium_[at] = {low, high, id, static_cast<uint32_t>(n)};
    } else {
      const uint64_t hash = remember(hash_bytes(p, n));
      size_t at = hash & (long_.size() - 1);
      while (long_[at].length) at = (at + 1) & (long_.size() - 1);
      long_[at] = {hash, id, static_cast<uint32_t>(n)};
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    if (byte_ids_[byte] == kNone) {
      throw std::invalid_argument("no token for the single byte " + quoted(std::string(1, static_cast<char>(byte))) +
                                  ": a byte-level vocabulary has all 256");
    }
  }

  has_merges_ = !merges.empty();
  const bool small = slots_ < MergeTable::kNoId && merges.size() < MergeTable::kNoId;
  if (!has_merges_) {
    if (small) {
      const std::vector<MergeTable::Pair> pairs = pairs_of_tokens(*this);
      merging_finds_tokens_ = pairs.size() + 256 == count_;
      make_pairs(pairs);
    }
    return;
  }
  pair_keys_.assign(table_size(merges.size()), kEmptyPair);
  pair_merges_.assign(pair_keys_.size(), Merge{kNone, kNone});
  std::vector<MergeTable::Pair> pairs;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto [left, right] = merges[rank];
    const std::string_view a = this->bytes(left), b = this->bytes(right);
    const uint32_t id = a.empty() || b.empty() ? kNone : find(std::string(a) + std::string(b));
    if (id == kNone) {
      throw std::invalid_argument("merge " + std::to_string(rank) + " (" + std::to_string(left) + ", " +
                                  std::to_string(right) + ") does not join two tokens to a token");
    }
    rank_ids_.push_back(id);
    const uint64_t key = uint64_t{left} << 32 | right;
    size_t at = mix(key) & (pair_keys_.size() - 1);
    while (pair_keys_[at] != kEmptyPair && pair_keys_[at] != key) at = (at + 1) & (pair_keys_.size() - 1);
    if (pair_keys_[at] == key) continue;  // the first of equals ranks
    pair_keys_[at] = key;
    pair_merges_[at] = {static_cast<uint32_t>(rank), id};
    pairs.push_back({left, right, static_cast<uint32_t>(rank)});
  }
  if (!small) return;
  make_pairs(pairs);
  std::vector<uint64_t>().swap(pair_keys_);
  std::vector<Merge>().swap(pair_merges_);
}

void Vocabulary::make_pairs(const std::vector<MergeTable::Pair>& pairs) {
  pairs_ = MergeTable(pairs);
  byte_ranks_.assign(65536, kNone);
  for (const auto& [left, right, rank] : pairs) {
    const std::string_view a = bytes(left), b = bytes(right);
    if (a.size() != 1 || b.size() != 1) continue;
    byte_ranks_[static_cast<uint8_t>(a[0]) | static_cast<uint8_t>(b[0]) << 8] = rank;
  }
}

uint32_t Vocabulary::find_longer(const uint8_t* p, size_t n) const {
  if (n <= 16) {
    const uint64_t low = load_upto8(p, 8), high = load_upto8(p + 8, n - 8);
    const uint64_t hash = medium_hash(low, high, n);
    if (!maybe(hash)) return kNone;
    for (size_t at = hash;; ++at) {
      const Medium& entry = medium_[at & (medium_.size() - 1)];
      if (entry.low == low && entry.high == high && entry.length == n) return entry.id;
      if (!entry.length) return kNone;
    }
  }
  if (n > max_token_bytes_) return kNone;
  const uint64_t hash = hash_bytes(p, n);
  if (!maybe(hash)) return kNone;
  for (size_t at = hash;; ++at) {
    const Long& entry = long_[at & (long_.size() - 1)];
    if (!entry.length) return kNone;
    if (entry.hash == hash && entry.length == n && !std::memcmp(arena_.data() + offsets_[entry.id], p, n)) {
      return entry.id;
    }
  }
}

uint32_t Vocabulary::find(std::string_view bytes) const {
  if (bytes.size() > max_token_bytes_) return kNone;
  std::string padded(bytes);
  padded.append(kPadding, '\0');
  return find(reinterpret_cast<const uint8_t*>(padded.data()), bytes.size());
}

Merge Vocabulary::find_merge(uint32_t left, uint32_t right) const {
  if (!pairs_.empty()) {
    const uint32_t rank = pairs_.rank(left, right);
    return {rank, rank == kNone || !has_merges_ ? rank : rank_ids_[rank]};
  }
  const uint64_t key = uint64_t{left} << 32 | right;
  for (size_t at = mix(key);; ++at) {
    const uint64_t found = pair_keys_[at & (pair_keys_.size() - 1)];
    if (found == key) return pair_merges_[at & (pair_keys_.size() - 1)];
    if (found == kEmptyPair) return {kNone, kNone};
  }
}

}  // namespace fastgpt::bpe
