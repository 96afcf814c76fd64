#include "bpe/merge.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace fastgpt::bpe {
namespace {

constexpr size_t kRadixBits = 11;
constexpr size_t kSmall = 64;                   // bytes up to which the scan beats the heap
constexpr size_t kKeptBytes = size_t{4} << 20;  // scratch memory above this is given back

// Joins by content: tiktoken's rule.
struct ByBytes {
  const Vocabulary& vocabulary;
  Merge operator()(const uint8_t* p, size_t n, uint32_t, uint32_t) const {
    const uint32_t id = vocabulary.find(p, n);
    return {id, id};
  }
};

// Joins by a list of pairs: the rule of minbpe and of Hugging Face's files.
struct ByPairs {
  const Vocabulary& vocabulary;
  Merge operator()(const uint8_t*, size_t, uint32_t left, uint32_t right) const {
    return vocabulary.find_merge(left, right);
  }
};

template <class Join>
size_t merge_small(const Vocabulary& vocabulary, const Join& join, const uint8_t* p, size_t n, uint32_t* out) {
  uint32_t rank[kSmall], joined[kSmall];
  uint8_t start[kSmall + 1];
  for (size_t i = 0; i < n; ++i) {
    out[i] = vocabulary.byte_id(p[i]);
    start[i] = static_cast<uint8_t>(i);
  }
  start[n] = static_cast<uint8_t>(n);
  auto look = [&](size_t i) {
    const Merge m = join(p + start[i], start[i + 2] - start[i], out[i], out[i + 1]);
    rank[i] = m.rank;
    joined[i] = m.id;
  };
  size_t count = n;
  for (size_t i = 0; i + 1 < count; ++i) look(i);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (rank[i] < rank[best]) best = i;
    }
    if (rank[best] == kNone) break;
    out[best] = joined[best];
    --count;
    for (size_t i = best + 1; i < count; ++i) {
      out[i] = out[i + 1];
      start[i] = start[i + 1];
      rank[i] = rank[i + 1];
      joined[i] = joined[i + 1];
    }
    start[count] = static_cast<uint8_t>(n);
    if (best + 1 < count) look(best);
    if (best) look(best - 1);
  }
  return count;
}

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

template <class Join>
size_t merge_with(const Vocabulary& vocabulary, const Join& join, const uint8_t* p, size_t n, uint32_t* out,
                  MergeScratch& scratch) {
  if (n <= kSmall) return merge_small(vocabulary, join, p, n, out);
  return merge_large(vocabulary, join, p, n, out, scratch);
}

}  // namespace

size_t merge_piece(const Vocabulary& vocabulary, const uint8_t* p, size_t n, uint32_t* out, MergeScratch& scratch) {
  if (vocabulary.has_merges()) return merge_with(vocabulary, ByPairs{vocabulary}, p, n, out, scratch);
  return merge_with(vocabulary, ByBytes{vocabulary}, p, n, out, scratch);
}

}  // namespace fastgpt::bpe
