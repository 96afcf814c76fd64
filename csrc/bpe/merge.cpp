#include "bpe/merge.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <string_view>
#include <utility>

#include "bpe/scanner.h"

namespace fastgpt::bpe {
namespace {

constexpr size_t kRadixBits = 11;
constexpr size_t kKeptBytes = size_t{4} << 20;  // scratch memory above this is given back

#include "bpe/merge_lanes.inl"

// Joins by the table of pairs.
struct ByTable {
  const Vocabulary& vocabulary;
  Merge operator()(const uint8_t*, size_t, uint32_t left, uint32_t right) const {
    return vocabulary.find_merge(left, right);
  }
};

// Joins by content: tiktoken's rule, for vocabularies too large for the table.
struct ByBytes {
  const Vocabulary& vocabulary;
  Merge operator()(const uint8_t* p, size_t n, uint32_t, uint32_t) const {
    const uint32_t id = vocabulary.find(p, n);
    return {id, id};
  }
};

// Sorts candidates (rank << 32 | position) that ascend by position: a stable radix sort by rank, which for a megabyte
// costs a fifth of sorting by comparing.
void sort_candidates(std::vector<uint64_t>& candidates, std::vector<uint64_t>& other) {
  if (candidates.size() < 4096) {
    std::sort(candidates.begin(), candidates.end());
    return;
  }
  uint64_t all_bits = 0;
  for (const uint64_t candidate : candidates) all_bits |= candidate >> 32;
  other.resize(candidates.size());
  for (int shift = 32; all_bits >> (shift - 32); shift += kRadixBits) {
    uint32_t places[1 << kRadixBits] = {};
    auto digit = [&](uint64_t candidate) { return candidate >> shift & ((1 << kRadixBits) - 1); };
    for (const uint64_t candidate : candidates) ++places[digit(candidate)];
    uint32_t before = 0;
    for (uint32_t& place : places) before += std::exchange(place, before);
    for (const uint64_t candidate : candidates) other[places[digit(candidate)]++] = candidate;
    candidates.swap(other);
  }
}

template <class Join>
size_t merge_large(const Vocabulary& vocabulary, const Join& join, const uint8_t* p, size_t n, uint32_t* out,
                   MergeScratch& scratch) {
  using Node = MergeScratch::Node;
  const uint32_t size = static_cast<uint32_t>(n);
  std::vector<Node>& nodes = scratch.nodes;
  // The pairs of the beginning are sorted once and taken in order; only those that merging makes go through a heap.
  std::vector<uint64_t>& sorted = scratch.sorted;
  std::vector<uint64_t>& heap = scratch.heap;
  nodes.resize(n);
  sorted.clear();
  sorted.reserve(n);
  auto look = [&](uint32_t at) {  // refreshes the rank of joining the node at `at` with the next one
    Node& node = nodes[at];
    node.rank = kNone;
    if (node.next == size) return;
    const Node& next = nodes[node.next];
    const Merge m = join(p + at, next.next - at, node.id, next.id);
    node.rank = m.rank;
    node.joined = m.id;
  };
  for (uint32_t i = 0; i < size; ++i) {
    nodes[i] = {vocabulary.byte_id(p[i]), kNone, kNone, i + 1, i ? i - 1 : kNone};
  }
  for (uint32_t i = 0; i + 1 < size; ++i) {
    look(i);
    if (nodes[i].rank != kNone) sorted.push_back(uint64_t{nodes[i].rank} << 32 | i);
  }
  sort_candidates(sorted, heap);
  heap.clear();
  auto push = [&](uint32_t at) {
    if (nodes[at].rank == kNone) return;
    heap.push_back(uint64_t{nodes[at].rank} << 32 | at);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  for (size_t taken = 0; taken < sorted.size() || !heap.empty();) {
    uint64_t best;
    if (heap.empty() || (taken < sorted.size() && sorted[taken] < heap.front())) {
      best = sorted[taken++];
    } else {
      best = heap.front();
      std::pop_heap(heap.begin(), heap.end(), std::greater<>());
      heap.pop_back();
    }
    const uint32_t rank = static_cast<uint32_t>(best >> 32), at = static_cast<uint32_t>(best);
    if (nodes[at].rank != rank) continue;  // changed since, or joined into its left neighbour
    const uint32_t gone = nodes[at].next;
    nodes[at].id = nodes[at].joined;
    nodes[at].next = nodes[gone].next;
    nodes[gone].rank = kNone;
    if (nodes[at].next != size) nodes[nodes[at].next].previous = at;
    look(at);
    push(at);
    if (nodes[at].previous != kNone) {
      look(nodes[at].previous);
      push(nodes[at].previous);
    }
  }
  size_t count = 0;
  for (uint32_t i = 0; i != size; i = nodes[i].next) out[count++] = nodes[i].id;
  if (nodes.capacity() * sizeof(Node) > kKeptBytes) std::vector<Node>().swap(nodes);
  if (sorted.capacity() * sizeof(uint64_t) > kKeptBytes) std::vector<uint64_t>().swap(sorted);
  if (heap.capacity() * sizeof(uint64_t) > kKeptBytes) std::vector<uint64_t>().swap(heap);
  return count;
}

// The ids that a token's bytes become where it is no token itself: those of two halves, or of more.
template <class Join>
size_t merge_shorter(const Vocabulary& vocabulary, const Join& join, std::string_view token, uint32_t* ids,
                     MergeScratch& scratch) {
  const size_t n = token.size();
  const uint8_t* const p = reinterpret_cast<const uint8_t*>(token.data());
  if (n > MergeJob::kMaxBytes) return merge_large(vocabulary, join, p, n, ids, scratch);
  uint32_t ranks[MergeJob::kMaxBytes];
  for (size_t i = 0; i < n; ++i) ids[i] = vocabulary.byte_id(p[i]);
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = vocabulary.find(p + i, 2);
  size_t left = n;
  while (left > 1) {
    const size_t at = static_cast<size_t>(std::min_element(ranks, ranks + left - 1) - ranks);
    if (ranks[at] == kNone) break;
    ids[at] = ranks[at];
    --left;
    std::copy(ids + at + 2, ids + left + 1, ids + at + 1);
    if (at + 1 < left) std::copy(ranks + at + 2, ranks + left, ranks + at + 1);
    if (at + 1 < left) ranks[at] = join(p, 0, ids[at], ids[at + 1]).rank;
    if (at) ranks[at - 1] = join(p, 0, ids[at - 1], ids[at]).rank;
  }
  return left;
}

// A table of pairs that grows.
class PairMap {
 public:
  explicit PairMap(size_t pairs) : entries_(std::bit_ceil(2 * pairs + 16), Entry{kNone, kNone, 0}) {}
  void add(uint32_t left, uint32_t right, uint32_t rank) {
    size_t at = place(left, right);
    while (entries_[at].left != kNone) at = (at + 1) & (entries_.size() - 1);
    entries_[at] = {left, right, rank};
  }
  Merge operator()(const uint8_t*, size_t, uint32_t left, uint32_t right) const {
    for (size_t at = place(left, right);; at = (at + 1) & (entries_.size() - 1)) {
      const Entry& entry = entries_[at];
      if (entry.left == left && entry.right == right) return {entry.rank, entry.rank};
      if (entry.left == kNone) return {kNone, kNone};
    }
  }

 private:
  using Entry = MergeTable::Pair;
  size_t place(uint32_t left, uint32_t right) const {
    return mix(uint64_t{left} << 32 | right) & (entries_.size() - 1);
  }
  std::vector<Entry> entries_;
};

}  // namespace

std::vector<MergeTable::Pair> pairs_of_tokens(const Vocabulary& vocabulary) {
  std::vector<uint32_t> by_length;
  for (uint32_t id = 0; id < vocabulary.slots(); ++id) {
    if (vocabulary.bytes(id).size() > 1) by_length.push_back(id);
  }
  std::stable_sort(by_length.begin(), by_length.end(),
                   [&](uint32_t a, uint32_t b) { return vocabulary.bytes(a).size() < vocabulary.bytes(b).size(); });
  PairMap known(by_length.size());
  std::vector<MergeTable::Pair> pairs;
  pairs.reserve(by_length.size());
  std::vector<uint32_t> ids(vocabulary.max_token_bytes());
  MergeScratch scratch;
  for (const uint32_t id : by_length) {
    if (vocabulary.bytes(id).size() == 2) {
      const std::string_view two = vocabulary.bytes(id);
      ids[0] = vocabulary.byte_id(static_cast<uint8_t>(two[0]));
      ids[1] = vocabulary.byte_id(static_cast<uint8_t>(two[1]));
    } else if (merge_shorter(vocabulary, known, vocabulary.bytes(id), ids.data(), scratch) != 2) {
      continue;
    }
    known.add(ids[0], ids[1], id);
    pairs.push_back({ids[0], ids[1], id});
  }
  return pairs;
}

MergeLanes merge_lanes_of(std::string_view isa) {
  if (isa == "avx512") return avx512_merge_lanes();
  if (isa == "avx2") return avx2_merge_lanes();
  return isa == "portable" ? &merge_lanes : nullptr;
}

void merge_pieces(const Vocabulary& vocabulary, MergeJob* jobs, size_t count, MergeScratch& scratch) {
  static const MergeLanes lanes = [] {
    const MergeLanes chosen = merge_lanes_of(scanner_isa());
    const MergeLanes avx2 = std::string_view(scanner_isa()) == "portable" ? nullptr : merge_lanes_of("avx2");
    return chosen ? chosen : avx2 ? avx2 : &merge_lanes;
  }();
  if (!vocabulary.pairs().empty()) return lanes(vocabulary.merge_rule(), jobs, count);
  for (size_t i = 0; i < count; ++i) {
    jobs[i].count = static_cast<uint32_t>(merge_piece(vocabulary, jobs[i].bytes, jobs[i].size, jobs[i].ids, scratch));
  }
}

size_t merge_piece(const Vocabulary& vocabulary, const uint8_t* p, size_t n, uint32_t* out, MergeScratch& scratch) {
  if (n <= MergeJob::kMaxBytes && !vocabulary.pairs().empty()) {
    MergeJob job{p, static_cast<uint32_t>(n), 0, out};
    merge_pieces(vocabulary, &job, 1, scratch);
    return job.count;
  }
  if (vocabulary.has_merges() || !vocabulary.pairs().empty()) {
    return merge_large(vocabulary, ByTable{vocabulary}, p, n, out, scratch);
  }
  return merge_large(vocabulary, ByBytes{vocabulary}, p, n, out, scratch);
}

}  // namespace fastgpt::bpe
