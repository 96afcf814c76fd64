#include "bpe/merge.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <utility>

namespace fastgpt::bpe {
namespace {

constexpr size_t kRadixBits = 11;
constexpr size_t kSmall = 64;  // bytes up to which the scan beats the heap: the bits of a word
constexpr int kPlaceBits = 6;  // for a place among them
constexpr size_t kMaxRank = size_t{1} << (31 - kPlaceBits);
constexpr size_t kLanes = 8;
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

// The scan: symbols stay where they begin and a bit mask says which are left, so nothing moves. A key is the rank of
// the pair that a symbol makes with the next one, its place in the lowest bits, so the least key is the leftmost of the
// pairs of lowest rank. Needs ranks below kMaxRank
// and 1 <= n <= kSmall.
template <class Join>
[[gnu::always_inline]] inline size_t merge_small_inline(const Vocabulary& vocabulary, const Join& join,
                                                        const uint8_t* p, size_t n, uint32_t* out) {
  alignas(64) uint32_t key[kSmall];
  uint32_t id[kSmall], joined[kSmall];
  const size_t padded = (n + kLanes - 1) / kLanes * kLanes;
  for (size_t i = padded - kLanes; i < padded; ++i) key[i] = kNone;
  for (size_t i = 0; i < n; ++i) id[i] = vocabulary.byte_id(p[i]);
  auto look = [&](size_t left, size_t right, size_t end) {
    const Merge m = join(p + left, end - left, id[left], id[right]);
    key[left] = m.rank == kNone ? kNone : m.rank << kPlaceBits | static_cast<uint32_t>(left);
    joined[left] = m.id;
  };
  for (size_t i = 0; i + 1 < n; ++i) look(i, i + 1, i + 2);
  uint64_t left = ~uint64_t{0} >> (kSmall - n);
  for (;;) {
    uint32_t best = kNone;
    for (size_t i = 0; i < padded; ++i) best = std::min(best, key[i]);
    if (best == kNone) break;
    const size_t at = best & (kSmall - 1);
    // The symbols after this one: the one that is joined, its right neighbour, the one after that.
    uint64_t after = left & ~uint64_t{1} << at;
    const int gone = std::countr_zero(after);
    left ^= uint64_t{1} << gone;
    key[gone] = key[at] = kNone;
    id[at] = joined[at];
    after &= after - 1;
    const size_t right = after ? static_cast<size_t>(std::countr_zero(after)) : n;
    if (after) {
      after &= after - 1;
      look(at, right, after ? static_cast<size_t>(std::countr_zero(after)) : n);
    }
    if (const uint64_t before = left & ((uint64_t{1} << at) - 1)) {
      look(static_cast<size_t>(63 - std::countl_zero(before)), at, right);
    }
  }
  size_t count = 0;
  for (; left; left &= left - 1) out[count++] = id[std::countr_zero(left)];
  return count;
}

template <class Join>
size_t merge_small_portable(const Vocabulary& vocabulary, const Join& join, const uint8_t* p, size_t n, uint32_t* out) {
  return merge_small_inline(vocabulary, join, p, n, out);
}

#if defined(__x86_64__)
template <class Join>
[[gnu::target("avx2,bmi,lzcnt")]] size_t merge_small_avx2(const Vocabulary& vocabulary, const Join& join,
                                                          const uint8_t* p, size_t n, uint32_t* out) {
  return merge_small_inline(vocabulary, join, p, n, out);
}
const bool kHasAvx2 =
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("lzcnt");
#endif

template <class Join>
size_t merge_small(const Vocabulary& vocabulary, const Join& join, const uint8_t* p, size_t n, uint32_t* out) {
#if defined(__x86_64__)
  if (kHasAvx2) return merge_small_avx2(vocabulary, join, p, n, out);
#endif
  return merge_small_portable(vocabulary, join, p, n, out);
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
  if (n <= kSmall && vocabulary.ranks() <= kMaxRank) return merge_small(vocabulary, join, p, n, out);
  return merge_large(vocabulary, join, p, n, out, scratch);
}

}  // namespace

size_t merge_piece(const Vocabulary& vocabulary, const uint8_t* p, size_t n, uint32_t* out, MergeScratch& scratch) {
  if (vocabulary.has_merges()) return merge_with(vocabulary, ByPairs{vocabulary}, p, n, out, scratch);
  return merge_with(vocabulary, ByBytes{vocabulary}, p, n, out, scratch);
}

}  // namespace fastgpt::bpe
