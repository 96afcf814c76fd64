#include "bpe/encoder.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <limits>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "bpe/pages.h"

namespace fastgpt::bpe {
namespace {

constexpr size_t kBatchSpans = 512;  // pre-tokens found before their ids are looked up
constexpr size_t kGroup = 96;  // pre-tokens whose lines are fetched at once: they must stay in the first-level cache
constexpr size_t kBytesPerId = 3;                 // room to begin with; English and code have more bytes an id
constexpr size_t kThreadBytes = size_t{1} << 20;  // text that is worth handing to another thread
constexpr size_t kKeptBytes = size_t{4} << 20;    // scratch memory above this is given back
constexpr size_t kRoom = WordCache::kReadable + Vocabulary::kPadding;  // readable after a pre-token taken in place
constexpr size_t kSlackIds = WordCache::kSlackIds;

std::logic_error no_pattern() {
  return std::logic_error("this vocabulary has no built-in pattern; give the pre-tokens");
}

const uint8_t* as_bytes(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

}  // namespace

IdBuffer::~IdBuffer() { std::free(data_); }

void IdBuffer::reserve_more(size_t more) {
  if (more <= capacity_ - size_) return;
  const size_t wanted = std::max(size_ + more, capacity_ + capacity_ / 2);
  if (wanted > std::numeric_limits<size_t>::max() / sizeof(uint32_t)) throw std::bad_alloc();
  void* const memory = std::realloc(data_, wanted * sizeof(uint32_t));
  if (!memory) throw std::bad_alloc();
  data_ = static_cast<uint32_t*>(memory);
  capacity_ = wanted;
  wish_large_pages(data_ + size_, (capacity_ - size_) * sizeof(uint32_t));
}

void IdBuffer::shrink() {
  if (size_ == capacity_ || !data_) return;
  void* const memory = std::realloc(data_, std::max<size_t>(size_, 1) * sizeof(uint32_t));
  if (!memory) return;  // the larger block stays
  data_ = static_cast<uint32_t*>(memory);
  capacity_ = std::max<size_t>(size_, 1);
}

uint32_t* IdBuffer::release() {
  uint32_t* const memory = data_;
  data_ = nullptr;
  size_ = capacity_ = 0;
  return memory;
}

struct Encoder::Worker {
  explicit Worker(uint32_t id_limit) : cache(id_limit) {}
  WordCache cache;
  MergeScratch scratch;
  uint32_t ends[kBatchSpans];
  WordCache::Probe probes[kGroup];
  uint8_t text[kShortBytes + kRoom] = {};
  struct Group {  // the pre-tokens that `probes` are of
    const uint8_t* text;
    const uint32_t* ends;
    size_t size;
    bool merged;  // whether those that were missing have been brought into the cache
  } group = {};
  MergeJob jobs[kGroup];    // the missing ones
  uint32_t missed[kGroup];  // their numbers
  uint32_t ids[kGroup * MergeJob::kMaxBytes];
};

// A worker of the encoder for the time of one call, or a new one when all are in use.
class Encoder::Borrowed {
 public:
  explicit Borrowed(const Encoder& encoder) : encoder_(encoder) {
    for (size_t i = 0; i < kWorkers; ++i) {
      bool free = false;
      if (!encoder.busy_[i].compare_exchange_strong(free, true, std::memory_order_acquire)) continue;
      place_ = i;
      if (!encoder.workers_[i]) {
        try {
          encoder.workers_[i] = std::make_unique<Worker>(encoder.vocabulary_.slots());
        } catch (...) {
          encoder.busy_[i].store(false, std::memory_order_release);
          throw;
        }
      }
      worker_ = encoder.workers_[i].get();
      return;
    }
    own_ = std::make_unique<Worker>(encoder.vocabulary_.slots());
    worker_ = own_.get();
  }
  ~Borrowed() {
    if (!own_) encoder_.busy_[place_].store(false, std::memory_order_release);
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Worker& operator*() const { return *worker_; }
  Worker* operator->() const { return worker_; }

 private:
  const Encoder& encoder_;
  size_t place_ = 0;
  Worker* worker_ = nullptr;
  std::unique_ptr<Worker> own_;
};

Encoder::Encoder(Vocabulary vocabulary, std::optional<Pattern> pattern, bool whole_first)
    : vocabulary_(std::move(vocabulary)),
      pattern_(pattern),
      whole_first_(whole_first),
      look_whole_(whole_first && !vocabulary_.merging_finds_tokens()) {
  if (pattern) scan_ = scanner_for(*pattern);
}

Encoder::~Encoder() = default;

// The ids of a pre-token by vocabulary and merging. padded[0, n + Vocabulary::kPadding) is readable.
size_t Encoder::merge_word(Worker& worker, const uint8_t* padded, size_t n, uint32_t* out) const {
  if (look_whole_ || (whole_first_ && n > MergeJob::kMaxBytes)) {
    out[0] = vocabulary_.find(padded, n);
    if (out[0] != kNone) return 1;
  }
  return merge_piece(vocabulary_, padded, n, out, worker.scratch);
}

// The same for up to WordCache::kMaxBytes bytes, remembered.
[[gnu::noinline]] size_t Encoder::find_or_merge(Worker& worker, const WordCache::Probe& probe, const uint8_t* p,
                                                size_t n, uint32_t* out) const {
  if (const size_t count = worker.cache.find(probe, p, n, out)) return count;
  const size_t count = merge_word(worker, p, n, out);
  worker.cache.insert(probe, p, n, out, count);
  return count;
}

// The same for more than WordCache::kMaxBytes bytes.
size_t Encoder::merge_long_word(Worker& worker, const uint8_t* padded, size_t n, uint32_t* out) const {
  if (n > WordCache::kMaxFarBytes) return merge_word(worker, padded, n, out);
  if (const size_t count = worker.cache.find_far(padded, n, out)) return count;
  const size_t count = merge_word(worker, padded, n, out);
  worker.cache.insert_far(padded, n, out, count);
  return count;
}

// The ids of the pre-token text[begin, end) to out (room for its bytes and kSlackIds more); returns how many.
size_t Encoder::encode_word(Worker& worker, const uint8_t* text, size_t size, size_t begin, size_t end,
                            uint32_t* out) const {
  const uint8_t* p = text + begin;
  const size_t n = end - begin;
  if (n <= WordCache::kMaxBytes) {
    uint8_t copy[WordCache::kMaxBytes + 1 + Vocabulary::kPadding] = {};
    if (size - begin < sizeof(copy)) {
      std::memcpy(copy, p, n);
      p = copy;
    }
    const WordCache::Probe probe = worker.cache.probe(p, n);
    return find_or_merge(worker, probe, p, n, out);
  }
  if (size - end >= Vocabulary::kPadding) return merge_long_word(worker, p, n, out);
  worker.scratch.padded.assign(n + Vocabulary::kPadding, 0);
  std::copy(p, text + end, worker.scratch.padded.begin());
  const size_t count = merge_long_word(worker, worker.scratch.padded.data(), n, out);
  if (worker.scratch.padded.size() > kKeptBytes) std::vector<uint8_t>().swap(worker.scratch.padded);
  return count;
}

// Merges those of `count` pre-tokens that are not in the cache, all in step, and puts them there. The first begins at
// text + begin; number i ends at text + ends[i] and has probes[i].
[[gnu::noinline]] void Encoder::merge_missing(Worker& worker, const uint8_t* text, size_t begin, const uint32_t* ends,
                                              const WordCache::Probe* probes, size_t count) const {
  size_t jobs = 0;
  uint32_t* ids = worker.ids;
  uint32_t found[WordCache::kSlackIds + WordCache::kMaxFarBytes];
  for (size_t i = 0; i < count; begin = ends[i++]) {
    const uint8_t* const p = text + begin;
    const size_t n = ends[i] - begin;
    if (n > MergeJob::kMaxBytes) continue;
    if (n <= WordCache::kMaxBytes) {
      if (n <= 15 && WordCache::find_quick(probes[i], n, found)) continue;
      if (worker.cache.find(probes[i], p, n, found)) continue;
    } else if (worker.cache.find_far(p, n, found)) {
      continue;
    }
    if (look_whole_) {
      const uint32_t id = vocabulary_.find(p, n);
      if (id != kNone) continue;  // one look-up: left to whoever needs it
    }
    worker.missed[jobs] = static_cast<uint32_t>(i);
    worker.jobs[jobs++] = {p, static_cast<uint32_t>(n), 0, ids};
    ids += n;
  }
  merge_pieces(vocabulary_, worker.jobs, jobs, worker.scratch);
  for (size_t i = 0; i < jobs; ++i) {
    const MergeJob& job = worker.jobs[i];
    // A pre-token that stands in the group twice is kept once: copies would take the places of others.
    if (job.size > WordCache::kMaxBytes) {
      if (worker.cache.find_far(job.bytes, job.size, found)) continue;
      worker.cache.insert_far(job.bytes, job.size, job.ids, job.count);
    } else {
      const WordCache::Probe& probe = probes[worker.missed[i]];
      if (worker.cache.find(probe, job.bytes, job.size, found)) continue;
      worker.cache.insert(probe, job.bytes, job.size, job.ids, job.count);
    }
  }
}

// The ids of a pre-token of worker.group that stands at no first place. The first one of a group that the cache does
// not have brings in all that follow.
[[gnu::noinline]] size_t Encoder::find_or_merge_group(Worker& worker, const WordCache::Probe& probe, const uint8_t* p,
                                                      size_t n, uint32_t* out) const {
  if (n <= WordCache::kMaxBytes) {
    if (const size_t count = worker.cache.find(probe, p, n, out)) return count;
  } else if (n <= WordCache::kMaxFarBytes) {
    if (const size_t count = worker.cache.find_far(p, n, out)) return count;
  }
  Worker::Group& group = worker.group;
  if (!group.merged) {
    group.merged = true;
    const size_t place = static_cast<size_t>(&probe - worker.probes);
    merge_missing(worker, group.text, static_cast<size_t>(p - group.text), group.ends + place, &probe,
                  group.size - place);
  }
  return n <= WordCache::kMaxBytes ? find_or_merge(worker, probe, p, n, out) : merge_long_word(worker, p, n, out);
}

// The ids of one pre-token of worker.group, whose probe has been made where it is of at most WordCache::kMaxBytes.
inline uint32_t* Encoder::encode_probed(Worker& worker, const WordCache::Probe& probe, const uint8_t* p, size_t n,
                                        uint32_t* out) const {
  if (__builtin_expect(n <= 15, 1)) {
    const size_t count = WordCache::find_quick(probe, n, out);
    if (__builtin_expect(count != 0, 1)) return out + count;
  }
  return out + find_or_merge_group(worker, probe, p, n, out);
}

// The ids of the pre-tokens that begin at `begin` and end at worker.ends[0, spans).
// Of the text, `readable` bytes may be read, at least its size.
uint32_t* Encoder::encode_words(Worker& worker, const uint8_t* text, size_t readable, size_t begin, size_t spans,
                                uint32_t* out) const {
  // How many can be read and merged in place.
  size_t inside = spans;
  while (inside && worker.ends[inside - 1] + kRoom > readable) --inside;
  for (size_t group = 0; group < inside; group += kGroup) {
    const size_t group_end = std::min(group + kGroup, inside);
    size_t from = begin;
    for (size_t i = group; i < group_end; from = worker.ends[i++]) {
      const size_t n = worker.ends[i] - from;
      if (__builtin_expect(n <= WordCache::kMaxBytes, 1)) {
        worker.probes[i - group] = worker.cache.probe(text + from, n);
        __builtin_prefetch(worker.probes[i - group].line);
      }
    }
    worker.group = {text, worker.ends + group, group_end - group, false};
    for (size_t i = group; i < group_end; begin = worker.ends[i++]) {
      out = encode_probed(worker, worker.probes[i - group], text + begin, worker.ends[i] - begin, out);
    }
  }
  for (size_t i = inside; i < spans; begin = worker.ends[i++]) {
    out += encode_word(worker, text, readable, begin, worker.ends[i], out);
  }
  return out;
}

// Cuts a text into parts that a scanner's offsets reach over and calls part(text, size) for each.
template <class Part>
void Encoder::scan_chunks(std::string_view text, const Part& part) const {
  if (!scan_) throw no_pattern();
  const uint8_t* p = as_bytes(text);
  size_t left = text.size();
  while (left) {
    size_t size = left;
    if (left > kMaxScanBytes) {
      size = safe_cut(p, left, kMaxScanBytes);
      if (!size) throw std::length_error("text: 1 GiB without a space between letters or a line to cut it at");
    }
    part(p, size);
    p += size;
    left -= size;
  }
}

void Encoder::encode(std::string_view text, IdBuffer& out) const {
  if (text.size() <= kShortBytes) {
    out.reserve_more(text.size() + kShortSlack);
    out.set_size(out.size() + encode_short(text, out.data() + out.size()));
    return;
  }
  Borrowed worker(*this);
  scan_chunks(text, [&](const uint8_t* p, size_t size) {
    for (size_t pos = 0; pos < size;) {
      const size_t spans = scan_(p, size, pos, worker->ends, kBatchSpans);
      out.reserve_more(worker->ends[spans - 1] - pos + kSlackIds);
      uint32_t* const ids = encode_words(*worker, p, size, pos, spans, out.data() + out.size());
      out.set_size(static_cast<size_t>(ids - out.data()));
      pos = worker->ends[spans - 1];
    }
  });
}

size_t Encoder::encode_short(std::string_view text, uint32_t* out) const {
  if (text.size() > kShortBytes) throw std::length_error("text: longer than encode_short takes");
  if (text.empty()) return 0;
  if (!scan_) throw no_pattern();
  Borrowed worker(*this);
  // Copied to where bytes behind the text may be read.
  std::memcpy(worker->text, text.data(), text.size());
  uint32_t* ids = out;
  for (size_t pos = 0; pos < text.size();) {
    const size_t spans = scan_(worker->text, text.size(), pos, worker->ends, kBatchSpans);
    ids = encode_words(*worker, worker->text, sizeof(worker->text), pos, spans, ids);
    pos = worker->ends[spans - 1];
  }
  return static_cast<size_t>(ids - out);
}

// Calls word(ids, how many) for every pre-token, until it returns false.
template <class Word>
void Encoder::for_each_word(std::string_view text, const Word& word) const {
  if (text.empty()) return;
  Borrowed worker(*this);
  IdBuffer ids;
  bool more = true;
  scan_chunks(text, [&](const uint8_t* p, size_t size) {
    for (size_t pos = 0; pos < size && more;) {
      const size_t spans = scan_(p, size, pos, worker->ends, kBatchSpans);
      for (size_t i = 0; i < spans && more; pos = worker->ends[i++]) {
        ids.reserve_more(worker->ends[i] - pos + kSlackIds);
        more = word(ids.data(), encode_word(*worker, p, size, pos, worker->ends[i], ids.data()));
      }
    }
  });
}

size_t Encoder::count(std::string_view text) const {
  size_t total = 0;
  for_each_word(text, [&](const uint32_t*, size_t count) {
    total += count;
    return true;
  });
  return total;
}

size_t Encoder::prefix_bytes(std::string_view text, size_t max_ids) const {
  size_t left = max_ids, bytes = 0;
  if (!left) return 0;
  for_each_word(text, [&](const uint32_t* ids, size_t count) {
    for (size_t i = 0; i < count && left; ++i, --left) bytes += vocabulary_.bytes(ids[i]).size();
    return left > 0;
  });
  return bytes;
}

void Encoder::encode_spans(std::string_view text, const uint64_t* begins, const uint64_t* ends, size_t count,
                           IdBuffer& out) const {
  Borrowed worker(*this);
  for (size_t i = 0; i < count; ++i) {
    if (ends[i] < begins[i] || ends[i] > text.size()) throw std::invalid_argument("pre-token outside of the text");
    const size_t n = ends[i] - begins[i];
    if (n == 0) continue;
    if (n > kMaxScanBytes) throw std::length_error("pre-token: longer than 1 GiB");
    out.reserve_more(n + kSlackIds);
    uint32_t* const ids = out.data() + out.size();
    out.set_size(out.size() + encode_word(*worker, as_bytes(text), text.size(), begins[i], ends[i], ids));
  }
}

void Encoder::encode_piece(std::string_view piece, IdBuffer& out) const {
  const uint64_t begin = 0, end = piece.size();
  encode_spans(piece, &begin, &end, 1, out);
}

void Encoder::pretokens(std::string_view text, std::vector<uint64_t>& out) const {
  uint32_t ends[kBatchSpans];
  uint64_t base = 0;
  scan_chunks(text, [&](const uint8_t* p, size_t size) {
    for (size_t pos = 0; pos < size;) {
      const size_t spans = scan_(p, size, pos, ends, kBatchSpans);
      for (size_t i = 0; i < spans; ++i) out.push_back(base + ends[i]);
      pos = ends[spans - 1];
    }
    base += size;
  });
}

void Encoder::encode_batch(const std::vector<std::string_view>& texts, size_t threads, IdBuffer& out,
                           std::vector<uint64_t>& ends) const {
  ends.reserve(texts.size());
  size_t total = 0;
  for (const auto& text : texts) total += text.size();
  if (total >= kThreadBytes) out.reserve_more(total / kBytesPerId);
  threads = std::min(threads, total / kThreadBytes + 1);
  if (threads <= 1) {
    for (const auto& text : texts) {
      encode(text, out);
      ends.push_back(out.size());
    }
    return;
  }

  // Jobs of about kThreadBytes: whole texts together, long texts in parts that end at certain boundaries.
  struct Part {
    std::string_view text;
    size_t index;
  };
  std::vector<Part> parts;
  for (size_t i = 0; i < texts.size(); ++i) {
    std::string_view rest = texts[i];
    while (rest.size() > 2 * kThreadBytes) {
      const size_t cut = safe_cut(as_bytes(rest), rest.size(), kThreadBytes);
      if (!cut) break;
      parts.push_back({rest.substr(0, cut), i});
      rest.remove_prefix(cut);
    }
    parts.push_back({rest, i});
  }
  std::vector<size_t> jobs{0};  // first part of each job, and the number of parts
  for (size_t i = 0, bytes = 0; i < parts.size(); ++i) {
    bytes += parts[i].text.size();
    if (bytes >= kThreadBytes || i + 1 == parts.size()) {
      jobs.push_back(i + 1);
      bytes = 0;
    }
  }
  std::vector<IdBuffer> results(jobs.size() - 1);
  std::vector<uint64_t> sizes(parts.size());
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  auto work = [&] {
    try {
      for (size_t job; (job = next.fetch_add(1)) < results.size() && !failed.load(std::memory_order_relaxed);) {
        for (size_t i = jobs[job]; i < jobs[job + 1]; ++i) {
          const size_t before = results[job].size();
          encode(parts[i].text, results[job]);
          sizes[i] = results[job].size() - before;
        }
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  try {
    for (size_t i = 1; i < threads; ++i) pool.emplace_back(work);
  } catch (const std::system_error&) {
    // Fewer threads than wished for: this one does the rest.
  }
  work();
  for (auto& thread : pool) thread.join();
  if (error) std::rethrow_exception(error);

  size_t ids = 0;
  for (const auto& result : results) ids += result.size();
  out.reserve_more(ids);
  ends.assign(texts.size(), 0);
  for (size_t i = 0; i < parts.size(); ++i) ends[parts[i].index] += sizes[i];
  uint64_t at = out.size();
  for (auto& end : ends) end = at += end;
  for (auto& result : results) {
    std::copy(result.data(), result.data() + result.size(), out.data() + out.size());
    out.set_size(out.size() + result.size());
    result = IdBuffer();
  }
}

size_t Encoder::cache_bytes() const {
  size_t bytes = 0;
  for (size_t i = 0; i < kWorkers; ++i) {
    bool free = false;
    if (!busy_[i].compare_exchange_strong(free, true, std::memory_order_acquire)) continue;
    if (workers_[i]) bytes += workers_[i]->cache.memory_bytes();
    busy_[i].store(false, std::memory_order_release);
  }
  return bytes;
}

}  // namespace fastgpt::bpe
