#include "bpe/encoder.h"

#include <algorithm>
#include <exception>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace fastgpt::bpe {
namespace {

constexpr size_t kBatchSpans = 512;  // pre-tokens found before their ids are looked up
constexpr size_t kGroup = 96;  // pre-tokens whose lines are fetched at once: they must stay in the first-level cache
constexpr size_t kJobs = 128;  // missing pre-tokens that are merged together
constexpr size_t kJobPlaces = 512;                // a power of two
constexpr size_t kBytesPerId = 3;                 // room to begin with; English and code have more bytes an id
constexpr size_t kThreadBytes = size_t{1} << 20;  // text that is worth another thread
constexpr size_t kJobBytes = size_t{1} << 18;     // text that a thread takes at once: the last one is waited for
constexpr size_t kKeptBytes = size_t{4} << 20;    // scratch memory above this is given back
constexpr size_t kRoom = WordCache::kReadable + Vocabulary::kPadding;  // readable after a pre-token taken in place
constexpr size_t kSlackIds = WordCache::kSlackIds;

std::logic_error no_pattern() {
  return std::logic_error("this vocabulary has no built-in pattern; give the pre-tokens");
}

const uint8_t* as_bytes(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

}  // namespace

struct Encoder::Worker {
  WordCache cache;
  MergeScratch scratch;
  uint32_t ends[kBatchSpans];
  WordCache::Probe probes[kGroup];
  uint8_t text[kShortBytes + kRoom] = {};
  // Pre-tokens of a call of encode_words that are not in the cache, each once, and where their ids belong.
  struct Hole {
    uint32_t* at;
    uint32_t job;
  };
  size_t job_count = 0, hole_count = 0;
  MergeJob jobs[kJobs];
  WordCache::Probe job_probes[kJobs];
  uint8_t job_places[kJobPlaces] = {};  // by hash: a job's number + 1; 0: none
  Hole holes[kBatchSpans];
  uint32_t ids[kJobs * MergeJob::kMaxBytes];
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
          encoder.workers_[i] = std::make_unique<Worker>();
        } catch (...) {
          encoder.busy_[i].store(false, std::memory_order_release);
          throw;
        }
      }
      worker_ = encoder.workers_[i].get();
      return;
    }
    own_ = std::make_unique<Worker>();
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

// The same, looked up in the cache first and remembered there.
[[gnu::noinline]] size_t Encoder::find_or_merge(Worker& worker, const WordCache::Probe& probe, const uint8_t* padded,
                                                size_t n, uint32_t* out) const {
  if (const size_t count = worker.cache.find(probe, padded, n, out)) return count;
  const size_t count = merge_word(worker, padded, n, out);
  worker.cache.insert(probe, padded, n, out, count);
  return count;
}

// The ids of the pre-token text[begin, end) to out (room for its bytes and kSlackIds more); returns how many.
size_t Encoder::encode_word(Worker& worker, const uint8_t* text, size_t size, size_t begin, size_t end,
                            uint32_t* out) const {
  const uint8_t* p = text + begin;
  const size_t n = end - begin;
  uint8_t copy[64 + kRoom];
  if (size - end < kRoom) {
    uint8_t* to = copy;
    if (n > 64) {
      worker.scratch.padded.resize(n + kRoom);
      to = worker.scratch.padded.data();
    }
    std::memcpy(to, p, n);
    std::memset(to + n, 0, kRoom);
    p = to;
  }
  const size_t count = find_or_merge(worker, worker.cache.probe(p, n), p, n, out);
  if (worker.scratch.padded.size() > kKeptBytes) std::vector<uint8_t>().swap(worker.scratch.padded);
  return count;
}

// The ids of a pre-token that stands at no first place of the cache. One that is not there at all is left for
// fill_holes. Returns by how much `out` moves on.
[[gnu::noinline]] size_t Encoder::find_or_queue(Worker& worker, const WordCache::Probe& probe, const uint8_t* p,
                                                size_t n, uint32_t* out) const {
  if (n > MergeJob::kMaxBytes || look_whole_) return find_or_merge(worker, probe, p, n, out);
  if (const size_t count = worker.cache.find(probe, p, n, out)) return count;
  const uint64_t key = probe.low ^ probe.high;
  size_t place = mix(key + n) >> 16 & (kJobPlaces - 1);
  for (; worker.job_places[place]; place = (place + 1) & (kJobPlaces - 1)) {
    const uint32_t job = worker.job_places[place] - 1u;
    if (worker.jobs[job].size != n || std::memcmp(worker.jobs[job].bytes, p, n)) continue;
    worker.holes[worker.hole_count++] = {out, job};
    return 0;
  }
  size_t moved = 0;
  if (worker.job_count == kJobs) {
    moved = fill_holes(worker, out);
    place = mix(key + n) >> 16 & (kJobPlaces - 1);
  }
  const uint32_t job = static_cast<uint32_t>(worker.job_count++);
  worker.job_places[place] = static_cast<uint8_t>(job + 1);
  worker.jobs[job] = {p, static_cast<uint32_t>(n), 0, worker.ids + job * MergeJob::kMaxBytes};
  worker.job_probes[job] = probe;
  worker.holes[worker.hole_count++] = {out + moved, job};
  return moved;
}

// Merges what find_or_queue has left, remembers it and moves the ids before `out` apart to put it between them. Returns
// by how much `out` moves on.
size_t Encoder::fill_holes(Worker& worker, uint32_t* out) const {
  const size_t jobs = worker.job_count;
  merge_pieces(vocabulary_, worker.jobs, jobs, worker.scratch);
  for (size_t i = 0; i < jobs; ++i) {
    const MergeJob& job = worker.jobs[i];
    worker.cache.insert(worker.job_probes[i], job.bytes, job.size, job.ids, job.count);
  }
  size_t total = 0;
  for (size_t i = 0; i < worker.hole_count; ++i) total += worker.jobs[worker.holes[i].job].count;
  const uint32_t* from = out;
  uint32_t* to = out + total;
  for (size_t i = worker.hole_count; i--;) {
    const Worker::Hole& hole = worker.holes[i];
    const MergeJob& job = worker.jobs[hole.job];
    const size_t after = static_cast<size_t>(from - hole.at);
    to -= after;
    std::memmove(to, hole.at, after * sizeof(uint32_t));
    to -= job.count;
    for (size_t k = 0; k < job.count; ++k) to[k] = job.ids[k];
    from = hole.at;
  }
  forget_jobs(worker);
  return total;
}

void Encoder::forget_jobs(Worker& worker) {
  std::memset(worker.job_places, 0, sizeof(worker.job_places));
  worker.job_count = worker.hole_count = 0;
}

// The ids of the pre-tokens of p that end at ends[0, spans), counted from `begin` on, where p stands. kRoom bytes may
// be read behind the last of them.
uint32_t* Encoder::encode_roomy(Worker& worker, const uint8_t* p, size_t begin, const uint32_t* ends, size_t spans,
                                uint32_t* out) const {
  const size_t first = begin;
  for (size_t group = 0; group < spans; group += kGroup) {
    const size_t group_end = std::min(group + kGroup, spans);
    uint32_t more[kGroup];  // those that are no words of the cache
    size_t from = begin, more_count = 0;
    WordCache::Probe* probe = worker.probes;
    for (size_t i = group; i < group_end; from = ends[i++], ++probe) {
      const size_t n = ends[i] - from;
      *probe = worker.cache.probe(p + (from - first), n);
      __builtin_prefetch(probe->line);
      if (__builtin_expect(!WordCache::is_word(n), 0)) more[more_count++] = static_cast<uint32_t>(i);
    }
    for (size_t k = 0; k < more_count; ++k) {
      const size_t i = more[k];
      worker.cache.fetch_rest(worker.probes[i - group], ends[i] - (i ? ends[i - 1] : first));
    }
    probe = worker.probes;
    for (size_t i = group; i < group_end; ++i, ++probe) {
      if (WordCache::find_quick(*probe, out)) continue;
      if (i > group) begin = ends[i - 1];
      out += find_or_queue(worker, *probe, p + (begin - first), ends[i] - begin, out);
    }
    begin = ends[group_end - 1];
  }
  return out;
}

// The ids of the pre-tokens that begin at `begin` and end at worker.ends[0, spans).
// Of the text, `readable` bytes may be read, at least its size.
uint32_t* Encoder::encode_words(Worker& worker, const uint8_t* text, size_t readable, size_t begin, size_t spans,
                                uint32_t* out) const {
  // How many can be read and merged in place.
  size_t inside = spans;
  while (inside && worker.ends[inside - 1] + kRoom > readable) --inside;
  if (worker.job_count) forget_jobs(worker);  // what an exception has left
  out = encode_roomy(worker, text + begin, begin, worker.ends, inside, out);
  if (inside) begin = worker.ends[inside - 1];
  // The text's last ones, of a few bytes together, are copied to where there is room.
  if (const size_t rest = worker.ends[spans - 1] - begin; inside < spans && rest <= kShortBytes) {
    std::memcpy(worker.text, text + begin, rest);
    out = encode_roomy(worker, worker.text, begin, worker.ends + inside, spans - inside, out);
    inside = spans;
  }
  if (worker.hole_count) out += fill_holes(worker, out);
  for (size_t i = inside; i < spans; begin = worker.ends[i++]) {
    out += encode_word(worker, text, readable, begin, worker.ends[i], out);
  }
  return out;
}

// Cuts a text into parts that a scanner's offsets reach over and calls part(text, size) for each, until it returns
// false.
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
    if (!part(p, size)) return;
    p += size;
    left -= size;
  }
}

// Encodes p[0, size), of which `readable` bytes may be read, some pre-tokens at a time: their ids go to room(bytes),
// and take(the ids' end) says whether to go on. Returns what it said last.
template <class Room, class Take>
bool Encoder::encode_scanned(Worker& worker, const uint8_t* p, size_t size, size_t readable, const Room& room,
                             const Take& take) const {
  for (size_t pos = 0; pos < size;) {
    const size_t spans = scan_(p, size, pos, worker.ends, kBatchSpans);
    const size_t next = worker.ends[spans - 1];
    if (!take(encode_words(worker, p, readable, pos, spans, room(next - pos)))) return false;
    pos = next;
  }
  return true;
}

void Encoder::encode(std::string_view text, IdBuffer& out) const {
  if (text.size() <= kShortBytes) {
    out.reserve_more(text.size() + kShortSlack);
    out.set_size(out.size() + encode_short(text, out.data() + out.size()));
    return;
  }
  const auto room = [&](size_t bytes) {
    out.reserve_more(bytes + kSlackIds);
    return out.data() + out.size();
  };
  const auto take = [&](const uint32_t* end) {
    out.set_size(static_cast<size_t>(end - out.data()));
    return true;
  };
  Borrowed worker(*this);
  scan_chunks(text, [&](const uint8_t* p, size_t size) { return encode_scanned(*worker, p, size, size, room, take); });
}

size_t Encoder::encode_short(std::string_view text, uint32_t* out) const {
  if (text.size() > kShortBytes) throw std::length_error("text: longer than encode_short takes");
  if (text.empty()) return 0;
  if (!scan_) throw no_pattern();
  Borrowed worker(*this);
  // Copied to where bytes behind the text may be read.
  std::memcpy(worker->text, text.data(), text.size());
  uint32_t* ids = out;
  const auto room = [&](size_t) { return ids; };
  const auto take = [&](uint32_t* end) {
    ids = end;
    return true;
  };
  encode_scanned(*worker, worker->text, text.size(), sizeof(worker->text), room, take);
  return static_cast<size_t>(ids - out);
}

// Calls take(ids, how many) for the ids of some pre-tokens at a time, until it returns false.
template <class Take>
void Encoder::for_each_batch(std::string_view text, const Take& take) const {
  if (text.empty()) return;
  Borrowed worker(*this);
  IdBuffer ids;
  const auto room = [&](size_t bytes) {
    ids.reserve_more(bytes + kSlackIds);
    return ids.data();
  };
  scan_chunks(text, [&](const uint8_t* p, size_t size) {
    return encode_scanned(*worker, p, size, size, room,
                          [&](const uint32_t* end) { return take(ids.data(), static_cast<size_t>(end - ids.data())); });
  });
}

size_t Encoder::count(std::string_view text) const {
  size_t total = 0;
  for_each_batch(text, [&](const uint32_t*, size_t count) {
    total += count;
    return true;
  });
  return total;
}

size_t Encoder::prefix_bytes(std::string_view text, size_t max_ids) const {
  size_t left = max_ids, bytes = 0;
  if (!left) return 0;
  for_each_batch(text, [&](const uint32_t* ids, size_t count) {
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
    return true;
  });
}

void Encoder::encode_batch(const std::vector<std::string_view>& texts, size_t threads, IdBuffer& out,
                           std::vector<uint64_t>& ends) const {
  ends.reserve(texts.size());
  size_t total = 0;
  for (const auto& text : texts) total += text.size();
  threads = std::min(threads, total / kThreadBytes + 1);
  if (threads <= 1) {
    if (total >= kThreadBytes) out.reserve_more(total / kBytesPerId);
    for (const auto& text : texts) {
      encode(text, out);
      ends.push_back(out.size());
    }
    return;
  }

  // Jobs of about kJobBytes: whole texts together, long texts in parts that end at certain boundaries.
  struct Part {
    std::string_view text;
    size_t index;
  };
  std::vector<Part> parts;
  for (size_t i = 0; i < texts.size(); ++i) {
    std::string_view rest = texts[i];
    while (rest.size() > 2 * kJobBytes) {
      const size_t cut = safe_cut(as_bytes(rest), rest.size(), kJobBytes);
      if (!cut) break;
      parts.push_back({rest.substr(0, cut), i});
      rest.remove_prefix(cut);
    }
    parts.push_back({rest, i});
  }
  std::vector<size_t> jobs{0};  // first part of each job, and the number of parts
  for (size_t i = 0, bytes = 0; i < parts.size(); ++i) {
    bytes += parts[i].text.size();
    if (bytes >= kJobBytes || i + 1 == parts.size()) {
      jobs.push_back(i + 1);
      bytes = 0;
    }
  }
  const size_t count = jobs.size() - 1;
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  auto on_all = [&](const auto& run) {  // run(thread) on all threads; this one is 0
    auto work = [&](size_t thread) {
      try {
        run(thread);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    };
    std::vector<std::thread> pool;
    try {
      for (size_t i = 1; i < threads; ++i) pool.emplace_back(work, i);
    } catch (const std::system_error&) {
      // Fewer threads than wished for: this one does the rest.
    }
    work(0);
    for (auto& thread : pool) thread.join();
    if (error) std::rethrow_exception(error);
  };
  // This thread takes jobs from the front, so that its ids are written where they belong; the others take them from the
  // back, each into a buffer of its own, until all meet.
  struct Result {
    size_t thread, at;  // where the job's ids are
  };
  struct Left {
    uint32_t front, back;
  };
  std::vector<Result> results(count);
  std::vector<IdBuffer> buffers(threads);
  std::vector<uint64_t> sizes(parts.size());
  std::atomic<Left> left{Left{0, static_cast<uint32_t>(count)}};
  const size_t before = out.size();
  auto next_job = [&](size_t thread) {
    for (Left now = left.load();;) {
      if (now.front == now.back) return count;
      const Left then = thread == 0 ? Left{now.front + 1, now.back} : Left{now.front, now.back - 1};
      if (left.compare_exchange_weak(now, then)) return size_t{thread == 0 ? now.front : then.back};
    }
  };
  try {
    on_all([&](size_t thread) {
      IdBuffer& ids = thread == 0 ? out : buffers[thread];
      ids.reserve_more(total / kBytesPerId / (thread == 0 ? 1 : threads));
      for (size_t job; !failed.load(std::memory_order_relaxed) && (job = next_job(thread)) < count;) {
        results[job] = {thread, ids.size()};
        for (size_t i = jobs[job]; i < jobs[job + 1]; ++i) {
          const size_t size = ids.size();
          encode(parts[i].text, ids);
          sizes[i] = ids.size() - size;
        }
      }
    });
  } catch (...) {
    out.set_size(before);
    throw;
  }

  std::vector<size_t> places(count + 1, before);
  ends.assign(texts.size(), 0);
  for (size_t job = 0; job < count; ++job) {
    places[job + 1] = places[job];
    for (size_t i = jobs[job]; i < jobs[job + 1]; ++i) {
      places[job + 1] += sizes[i];
      ends[parts[i].index] += sizes[i];
    }
  }
  uint64_t at = before;
  for (auto& end : ends) end = at += end;
  out.reserve_more(places[count] - out.size());
  std::atomic<size_t> next{left.load().front};  // the first job of another thread
  on_all([&](size_t) {
    for (size_t job; (job = next.fetch_add(1)) < count;) {
      const uint32_t* const ids = buffers[results[job].thread].data() + results[job].at;
      std::copy(ids, ids + (places[job + 1] - places[job]), out.data() + places[job]);
    }
  });
  out.set_size(places[count]);
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
