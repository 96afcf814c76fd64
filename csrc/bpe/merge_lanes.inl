// Merging of many pieces of up to 64 bytes in step; included once for every instruction set.
//
// A step of a piece waits: for the least key, for the look-ups of the two new pairs, for the keys that they give. Steps
// have no branch but the last one of a piece, so the processor works on the steps of several pieces ("lanes") at once.
//
// Symbols stay where they begin and a bit mask says which are left, so nothing moves. A key is the rank of the pair
// that a symbol makes with the next one, its place in the lowest bits, so the least key is the leftmost of the pairs of
// lowest rank.

typedef uint32_t Keys __attribute__((vector_size(64)));
typedef uint32_t Keys8 __attribute__((vector_size(32)));
typedef uint32_t Keys4 __attribute__((vector_size(16)));
typedef uint32_t Keys2 __attribute__((vector_size(8)));

constexpr size_t kKeys = 16;  // in one vector
constexpr int kPlaceBits = 6;
constexpr uint32_t kNoKey = kNone << kPlaceBits;  // this and everything above, as places are in the lowest bits
constexpr size_t kLanes = 8;

// The lesser of the two halves, place by place.
template <class Half, class Whole>
inline void halve(const Whole& keys, Half& least) {
  Half half[2];
  static_assert(sizeof(half) == sizeof(keys));
  std::memcpy(half, &keys, sizeof(keys));
  least = half[0] < half[1] ? half[0] : half[1];
}

// Pieces of up to 16 * kVectors bytes.
template <int kVectors>
class Lane {
 public:
  void start(const MergeRule& rule, MergeJob& job) {
    job_ = &job;
    const uint8_t* const p = job.bytes;
    const size_t n = job.size;
    alignas(64) uint32_t keys[kKeys * kVectors];
    std::fill(keys, keys + kKeys * kVectors, kNoKey);
    for (size_t i = 0; i + 1 < n; ++i) {
      keys[i] = rule.byte_ranks[p[i] | p[i + 1] << 8] << kPlaceBits | static_cast<uint32_t>(i);
    }
    std::memcpy(keys_, keys, sizeof(keys));
    for (size_t i = 0; i < n; ++i) ids_[i + 1] = rule.byte_ids[p[i]];
    left_ = ~uint64_t{0} >> (64 - n);
  }

  // Joins one pair; false: there was none.
  bool step(const MergeRule& rule) {
    Keys least = keys_[0];
    for (int v = 1; v < kVectors; ++v) least = keys_[v] < least ? keys_[v] : least;
    Keys8 eight;
    Keys4 four;
    Keys2 two;
    halve(least, eight);
    halve(eight, four);
    halve(four, two);
    const uint32_t best = two[0] < two[1] ? two[0] : two[1];
    if (best >= kNoKey) return false;
    const uint32_t at = best & 63;
    const uint32_t rank = best >> kPlaceBits;
    const uint32_t id = rule.ids ? rule.ids[rank] : rank;
    // The symbols after this one: the one that is joined, and its right neighbour; 64: none.
    uint64_t after = left_ & ~uint64_t{1} << at;
    const uint32_t gone = static_cast<uint32_t>(std::countr_zero(after));
    after &= after - 1;
    const uint32_t right = static_cast<uint32_t>(std::countr_zero(after));
    left_ ^= uint64_t{1} << gone;
    const uint64_t before = left_ & ((uint64_t{1} << at) - 1);
    const uint32_t previous = 63 - static_cast<uint32_t>(std::countl_zero(before));  // 2^32 - 1: none
    ids_[at + 1] = id;
    const uint32_t key = rule.pairs->rank(id, ids_[right + 1]) << kPlaceBits | at;
    const uint32_t previous_key =
        rule.pairs->rank(ids_[static_cast<int32_t>(previous) + 1], id) << kPlaceBits | (previous & 63);
    Keys place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int v = 0; v < kVectors; ++v, place += kKeys) {
      Keys keys = keys_[v];
      keys = place == at ? Keys{} + key : keys;
      keys = place == gone ? Keys{} + kNoKey : keys;
      keys_[v] = place == previous ? Keys{} + previous_key : keys;
    }
    return true;
  }

  void finish() {
    size_t count = 0;
    for (uint64_t left = left_; left; left &= left - 1) job_->ids[count++] = ids_[std::countr_zero(left) + 1];
    job_->count = static_cast<uint32_t>(count);
  }

  Lane() { ids_[0] = ids_[65] = MergeTable::kNoId; }

 private:
  Keys keys_[kVectors];
  uint64_t left_;
  MergeJob* job_;
  uint32_t ids_[66];  // from place 1 on; before and after all places one that no pair has
};

// The jobs of more than 16 * kVectors / 2 bytes (one vector: of any) and up to 16 * kVectors.
template <int kVectors>
void merge_sized(const MergeRule& rule, MergeJob* jobs, size_t count) {
  constexpr size_t kAtMost = kKeys * kVectors, kAtLeast = kVectors == 1 ? 1 : kAtMost / 2 + 1;
  Lane<kVectors> lanes[kLanes];
  uint8_t active[kLanes];
  size_t next = 0, running = 0;
  auto refill = [&](uint8_t lane) {
    while (next < count && (jobs[next].size < kAtLeast || jobs[next].size > kAtMost)) ++next;
    if (next == count) return false;
    lanes[lane].start(rule, jobs[next++]);
    return true;
  };
  while (running < kLanes && refill(static_cast<uint8_t>(running))) {
    active[running] = static_cast<uint8_t>(running);
    ++running;
  }
  while (running) {
    for (size_t i = 0; i < running; ++i) {
      if (__builtin_expect(lanes[active[i]].step(rule), 1)) continue;
      lanes[active[i]].finish();
      if (!refill(active[i])) active[i--] = active[--running];
    }
  }
}

void merge_lanes(const MergeRule& rule, MergeJob* jobs, size_t count) {
  size_t longest = 0, above16 = 0, above32 = 0;
  for (size_t i = 0; i < count; ++i) {
    longest = std::max<size_t>(longest, jobs[i].size);
    above16 += jobs[i].size > 16;
    above32 += jobs[i].size > 32;
  }
  if (above16 < count) merge_sized<1>(rule, jobs, count);
  if (above32 < above16) merge_sized<2>(rule, jobs, count);
  if (longest > 32) merge_sized<4>(rule, jobs, count);
}
