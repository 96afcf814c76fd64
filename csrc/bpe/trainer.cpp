#include "bpe/trainer.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "bpe/word_counts.h"

namespace fastgpt::bpe {
namespace {

constexpr size_t kPartBytes = size_t{1} << 20;
constexpr uint32_t kDead = 0xFFFFFFFFu;  // the symbol of a place that was joined into its left neighbour
constexpr uint32_t kEdge = 0xFFFFFFFEu;  // the symbol between words

// A symbol of a word; the words stand one after the other with an edge before each and at the end.
struct Node {
  uint32_t symbol;
  uint32_t next, previous;  // places; an edge is a place
  uint32_t times;           // of the word
};

struct Pair {
  uint64_t key;  // left << 32 | right
  int64_t count;
  const uint32_t* places;  // where its left symbol stands or stood, ascending
  uint32_t size;
};

// Index of pairs by key.
class PairIndex {
 public:
  PairIndex() : table_(size_t{1} << 16, Entry{0, kNone}) {}
  uint32_t find(uint64_t key) const {
    for (size_t at = mix(key);; ++at) {
      const Entry& entry = table_[at & (table_.size() - 1)];
      if (entry.pair == kNone || entry.key == key) return entry.pair;
    }
  }
  void insert(uint64_t key, uint32_t pair) {
    if (++used_ * 2 > table_.size()) {
      std::vector<Entry> old(table_.size() * 2, Entry{0, kNone});
      old.swap(table_);
      for (const Entry& entry : old) {
        if (entry.pair != kNone) put(entry);
      }
    }
    put({key, pair});
  }

 private:
  struct Entry {
    uint64_t key;
    uint32_t pair;
  };
  void put(const Entry& entry) {
    size_t at = mix(entry.key) & (table_.size() - 1);
    while (table_[at].pair != kNone) at = (at + 1) & (table_.size() - 1);
    table_[at] = entry;
  }
  std::vector<Entry> table_;
  size_t used_ = 0;
};

// Memory for the lists of places; a list never grows after its step, so it is one piece.
class PlaceArena {
 public:
  uint32_t* allocate(size_t n) {
    if (n > left_) {
      left_ = std::max(n, kChunk);
      chunks_.push_back(std::make_unique_for_overwrite<uint32_t[]>(left_));
      at_ = chunks_.back().get();
    }
    uint32_t* const places = at_;
    at_ += n;
    left_ -= n;
    return places;
  }

 private:
  static constexpr size_t kChunk = size_t{1} << 18;
  std::vector<std::unique_ptr<uint32_t[]>> chunks_;
  uint32_t* at_ = nullptr;
  size_t left_ = 0;
};

struct Candidate {
  int64_t count;
  uint64_t key;
  uint32_t pair;
  // The heap's top is the greatest: most frequent, then the smallest pair of ids.
  bool operator<(const Candidate& other) const { return count != other.count ? count < other.count : key > other.key; }
};

// The joining steps. Pairs rarer than a threshold stay outside the heap until everything above it is used up: most
// pairs occur once or twice and never matter.
class Joiner {
 public:
  explicit Joiner(const WordCounts& words) {
    size_t places = 1;
    words.for_each([&](std::string_view word, uint64_t times) {
      if (word.size() > 1) places += (word.size() + 1) * copies(times);
    });
    if (places >= kEdge) throw std::length_error("training text: 2^32 bytes of distinct pre-tokens");
    nodes_.reserve(places);
    words.for_each([&](std::string_view word, uint64_t times) {
      if (word.size() < 2) return;
      for (uint64_t left = times; left;) {  // in parts that 32 bits can count
        const uint32_t part = static_cast<uint32_t>(std::min<uint64_t>(left, kMaxTimes));
        left -= part;
        append(kEdge, part);
        for (const char c : word) append(static_cast<uint8_t>(c), part);
      }
    });
    append(kEdge, 0);
    count_byte_pairs();
  }

  std::vector<std::pair<uint32_t, uint32_t>> run(size_t merges, int64_t min_frequency,
                                                 const std::function<void(size_t)>& progress) {
    std::vector<std::pair<uint32_t, uint32_t>> done;
    while (done.size() < merges) {
      const uint32_t best = pop(min_frequency);
      if (best == kNone) break;
      const uint64_t key = pairs_[best].key;
      done.emplace_back(static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(key));
      join(best, static_cast<uint32_t>(255 + done.size()));
      if (progress && done.size() % 64 == 0) progress(done.size());
    }
    return done;
  }

 private:
  static constexpr uint64_t kMaxTimes = 0xFFFFFFFFu;

  static size_t copies(uint64_t times) { return (times + kMaxTimes - 1) / kMaxTimes; }

  void append(uint32_t symbol, uint32_t times) {
    const uint32_t at = static_cast<uint32_t>(nodes_.size());
    nodes_.push_back({symbol, at + 1, at - 1, times});
  }

  void count_byte_pairs() {
    std::vector<int64_t> counts(65536);
    std::vector<uint32_t> sizes(65536);
    auto for_each_pair = [&](auto visit) {
      for (uint32_t at = 1; at + 1 < nodes_.size(); ++at) {
        const uint32_t left = nodes_[at].symbol, right = nodes_[at + 1].symbol;
        if (left != kEdge && right != kEdge) visit(left << 8 | right, at);
      }
    };
    for_each_pair([&](uint32_t pair, uint32_t at) {
      counts[pair] += nodes_[at].times;
      ++sizes[pair];
    });
    std::vector<uint32_t*> lists(65536);
    for (uint32_t pair = 0; pair < 65536; ++pair) {
      if (!sizes[pair]) continue;
      lists[pair] = arena_.allocate(sizes[pair]);
      add_pair(uint64_t{pair >> 8} << 32 | (pair & 255), counts[pair], lists[pair], sizes[pair]);
      threshold_ = std::max(threshold_, counts[pair] / 8 + 1);
    }
    for_each_pair([&](uint32_t pair, uint32_t at) { *lists[pair]++ = at; });
    below_ = INT64_MAX;
    fill_heap();
  }

  void add_pair(uint64_t key, int64_t count, const uint32_t* places, uint32_t size) {
    const uint32_t pair = static_cast<uint32_t>(pairs_.size());
    pairs_.push_back({key, count, places, size});
    index_.insert(key, pair);
  }

  void push(uint32_t pair) {
    heap_.push_back({pairs_[pair].count, pairs_[pair].key, pair});
    std::push_heap(heap_.begin(), heap_.end());
  }

  // Takes in the pairs with threshold_ <= count < below_.
  void fill_heap() {
    for (uint32_t pair = 0; pair < pairs_.size(); ++pair) {
      const int64_t count = pairs_[pair].count;
      if (count >= threshold_ && count < below_) heap_.push_back({count, pairs_[pair].key, pair});
    }
    std::make_heap(heap_.begin(), heap_.end());
  }

  // The most frequent pair, or kNone when none reaches min_frequency. Counts only fall after a pair's first step, so an
  // entry that is out of date was an upper bound.
  uint32_t pop(int64_t min_frequency) {
    for (;;) {
      while (!heap_.empty()) {
        const Candidate top = heap_.front();
        if (top.count < min_frequency) return kNone;
        std::pop_heap(heap_.begin(), heap_.end());
        heap_.pop_back();
        const int64_t count = pairs_[top.pair].count;
        if (count == top.count) return top.pair;
        if (count >= threshold_) push(top.pair);
      }
      if (threshold_ <= min_frequency) return kNone;
      below_ = threshold_;
      threshold_ = std::max(min_frequency, threshold_ / 8);
      fill_heap();
    }
  }

  // Per neighbour of the joined pair: how often it stands left (or right) of it, where, and what the old pair loses.
  struct Neighbour {
    int64_t gained = 0, lost = 0;
    uint32_t size = 0;
    uint32_t* places = nullptr;
  };
  struct Side {
    std::vector<Neighbour> of;  // by symbol
    std::vector<uint32_t> seen;
    Neighbour& at(uint32_t symbol) {
      Neighbour& n = of[symbol];
      if (!n.gained && !n.lost) seen.push_back(symbol);
      return n;
    }
  };

  void join(uint32_t best, uint32_t id) {
    const uint32_t a = static_cast<uint32_t>(pairs_[best].key >> 32), b = static_cast<uint32_t>(pairs_[best].key);
    left_.of.resize(id + 1);
    right_.of.resize(id + 1);
    events_.clear();
    const uint32_t* const places = pairs_[best].places;
    for (uint32_t i = 0; i < pairs_[best].size; ++i) {
      if (i + kAhead < pairs_[best].size) __builtin_prefetch(&nodes_[places[i + kAhead]]);
      const uint32_t at = places[i];
      Node& node = nodes_[at];
      if (node.symbol != a) continue;
      const uint32_t gone = node.next;
      if (nodes_[gone].symbol != b) continue;
      const int64_t times = node.times;
      const uint32_t before = node.previous, after = nodes_[gone].next;
      nodes_[gone].symbol = kDead;
      node.symbol = id;
      node.next = after;
      nodes_[after].previous = at;
      if (const uint32_t x = nodes_[before].symbol; x != kEdge) {
        Neighbour& n = left_.at(x);
        n.gained += times;
        n.lost += times;
        ++n.size;
        events_.push_back({x, before, true});
      }
      if (const uint32_t y = nodes_[after].symbol; y != kEdge) {
        Neighbour& n = right_.at(y);
        n.gained += times;
        n.lost += times;
        ++n.size;
        events_.push_back({y, at, false});
      }
    }
    pairs_[best].count = 0;
    pairs_[best].size = 0;

    const uint32_t first = static_cast<uint32_t>(pairs_.size());
    for (const uint32_t x : left_.seen) create(left_.of[x], uint64_t{x} << 32 | id);
    for (const uint32_t y : right_.seen) create(right_.of[y], uint64_t{id} << 32 | y);
    for (const Event& event : events_) {
      Neighbour& n = (event.left ? left_ : right_).of[event.symbol];
      *n.places++ = event.place;
    }
    for (const uint32_t x : left_.seen) lose(left_.of[x], uint64_t{x} << 32 | a, best);
    for (const uint32_t y : right_.seen) lose(right_.of[y], uint64_t{b} << 32 | y, best);
    for (const uint32_t x : left_.seen) left_.of[x] = Neighbour();
    for (const uint32_t y : right_.seen) right_.of[y] = Neighbour();
    left_.seen.clear();
    right_.seen.clear();
    for (uint32_t pair = first; pair < pairs_.size(); ++pair) {
      if (pairs_[pair].count >= threshold_) push(pair);
    }
  }

  void create(Neighbour& n, uint64_t key) {
    n.places = arena_.allocate(n.size);
    add_pair(key, n.gained, n.places, n.size);
  }

  void lose(const Neighbour& n, uint64_t key, uint32_t best) {
    const uint32_t pair = index_.find(key);
    if (pair != kNone && pair != best) pairs_[pair].count -= n.lost;
  }

  static constexpr uint32_t kAhead = 8;  // places whose nodes are fetched ahead

  struct Event {
    uint32_t symbol, place;
    bool left;
  };

  std::vector<Node> nodes_;
  std::vector<Pair> pairs_;
  PairIndex index_;
  PlaceArena arena_;
  std::vector<Candidate> heap_;
  int64_t threshold_ = 1, below_ = 0;
  Side left_, right_;
  std::vector<Event> events_;
};

}  // namespace

Trainer::Trainer(std::optional<Pattern> pattern, size_t threads) {
  if (pattern) scan_ = scanner_for(*pattern);
  for (size_t i = 0; i < std::max<size_t>(threads, 1); ++i) counts_.push_back(std::make_unique<WordCounts>());
}

Trainer::~Trainer() = default;

void Trainer::feed(const std::vector<std::string_view>& texts) {
  if (!scan_) throw std::logic_error("this trainer has no built-in pattern; give the pre-tokens");
  std::vector<std::string_view> parts;
  for (std::string_view text : texts) {
    while (!text.empty()) {
      size_t cut = text.size();
      if (text.size() > 2 * kPartBytes) {
        const uint8_t* const p = reinterpret_cast<const uint8_t*>(text.data());
        cut = safe_cut(p, text.size(), kPartBytes);
        if (!cut && text.size() > kMaxScanBytes) cut = safe_cut(p, text.size(), kMaxScanBytes);
        if (!cut) cut = text.size();
        if (cut > kMaxScanBytes) throw std::length_error("text: 1 GiB without a place to cut it at");
      }
      parts.push_back(text.substr(0, cut));
      text.remove_prefix(cut);
    }
  }
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  auto work = [&](size_t thread) {
    try {
      std::vector<uint32_t> ends(1024);
      for (size_t part; (part = next.fetch_add(1)) < parts.size() && !failed.load();) {
        const uint8_t* const p = reinterpret_cast<const uint8_t*>(parts[part].data());
        const size_t size = parts[part].size();
        for (size_t pos = 0; pos < size;) {
          const size_t spans = scan_(p, size, pos, ends.data(), ends.size());
          for (size_t i = 0; i < spans; pos = ends[i++]) {
            counts_[thread]->add(p + pos, ends[i] - pos, size - pos, 1);
          }
        }
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  try {
    for (size_t i = 1; i < std::min(counts_.size(), parts.size()); ++i) pool.emplace_back(work, i);
  } catch (const std::system_error&) {
    // Fewer threads than wished for: this one does the rest.
  }
  work(0);
  for (auto& thread : pool) thread.join();
  if (error) std::rethrow_exception(error);
}

void Trainer::feed_spans(std::string_view text, const uint64_t* begins, const uint64_t* ends, size_t count) {
  const uint8_t* const p = reinterpret_cast<const uint8_t*>(text.data());
  for (size_t i = 0; i < count; ++i) {
    if (ends[i] < begins[i] || ends[i] > text.size()) throw std::invalid_argument("pre-token outside of the text");
    if (ends[i] > begins[i]) counts_[0]->add(p + begins[i], ends[i] - begins[i], text.size() - begins[i], 1);
  }
}

size_t Trainer::distinct_words() const { return distinct_words_; }

std::vector<std::pair<uint32_t, uint32_t>> Trainer::train(size_t merges, uint64_t min_frequency,
                                                          const std::function<void(size_t)>& progress) {
  while (counts_.size() > 1) {
    counts_[0]->add_all(*counts_.back());
    counts_.pop_back();
  }
  distinct_words_ = counts_[0]->size();
  Joiner joiner(*counts_[0]);
  counts_[0] = std::make_unique<WordCounts>();
  return joiner.run(merges, static_cast<int64_t>(std::max<uint64_t>(min_frequency, 1)), progress);
}

}  // namespace fastgpt::bpe
