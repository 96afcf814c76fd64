// From text to ids: pre-token, cache, merge.
//
// Most pre-tokens of a text have been seen before, so each worker holds a cache of whole pre-tokens with their ids
// (word_cache.h: at most 46 MiB, taken as it fills). What is not there is looked up whole in the vocabulary and else
// merged.
//
// Thread safety: const methods may be called from any number of threads. A call borrows a worker from a fixed array by
// one compare-and-swap; nobody ever waits, so a fork while another thread encodes leaves nothing locked.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bpe/id_buffer.h"
#include "bpe/merge.h"
#include "bpe/scanner.h"
#include "bpe/vocabulary.h"
#include "bpe/word_cache.h"

namespace fastgpt::bpe {

class Encoder {
 public:
  // whole_first: a pre-token that is a token gets its id without merging (tiktoken's rule, Hugging Face's
  // "ignore_merges"). pattern: none where the caller always gives the pre-tokens himself.
  Encoder(Vocabulary vocabulary, std::optional<Pattern> pattern, bool whole_first);
  ~Encoder();

  const Vocabulary& vocabulary() const { return vocabulary_; }
  std::optional<Pattern> pattern() const { return pattern_; }

  // Appends the ids of text to out.
  void encode(std::string_view text, IdBuffer& out) const;
  // Writes the ids of a text of up to kShortBytes bytes to out, which has room for its bytes and kShortSlack more, and
  // returns how many.
  static constexpr size_t kShortBytes = 4096;
  static constexpr size_t kShortSlack = WordCache::kSlackIds;
  size_t encode_short(std::string_view text, uint32_t* out) const;
  // The same for pre-tokens text[begins[i], ends[i]); what lies between them is dropped.
  void encode_spans(std::string_view text, const uint64_t* begins, const uint64_t* ends, size_t count,
                    IdBuffer& out) const;
  // One pre-token, whatever its bytes.
  void encode_piece(std::string_view piece, IdBuffer& out) const;
  // How many ids text has, without keeping them.
  size_t count(std::string_view text) const;
  // How many bytes of text its first max_ids ids stand for.
  size_t prefix_bytes(std::string_view text, size_t max_ids) const;
  // The ids of several texts, one after the other, on up to `threads` threads; ends[i] is where text i ends in out.
  void encode_batch(const std::vector<std::string_view>& texts, size_t threads, IdBuffer& out,
                    std::vector<uint64_t>& ends) const;
  // The ends of the pre-tokens of text.
  void pretokens(std::string_view text, std::vector<uint64_t>& ends) const;

  size_t cache_bytes() const;  // held by workers now

 private:
  struct Worker;
  class Borrowed;
  static constexpr size_t kWorkers = 64;

  template <class Part>
  void scan_chunks(std::string_view text, const Part& part) const;
  template <class Room, class Take>
  bool encode_scanned(Worker& worker, const uint8_t* p, size_t size, size_t readable, const Room& room,
                      const Take& take) const;
  template <class Take>
  void for_each_batch(std::string_view text, const Take& take) const;
  size_t encode_word(Worker& worker, const uint8_t* text, size_t size, size_t begin, size_t end, uint32_t* out) const;
  size_t find_or_queue(Worker& worker, const WordCache::Probe& probe, const uint8_t* p, size_t n, uint32_t* out) const;
  size_t fill_holes(Worker& worker, uint32_t* out) const;
  static void forget_jobs(Worker& worker);
  uint32_t* encode_roomy(Worker& worker, const uint8_t* p, size_t begin, const uint32_t* ends, size_t spans,
                         uint32_t* out) const;
  uint32_t* encode_words(Worker& worker, const uint8_t* text, size_t readable, size_t begin, size_t spans,
                         uint32_t* out) const;
  size_t find_or_merge(Worker& worker, const WordCache::Probe& probe, const uint8_t* p, size_t n, uint32_t* out) const;
  size_t merge_word(Worker& worker, const uint8_t* padded, size_t n, uint32_t* out) const;

  Vocabulary vocabulary_;
  std::optional<Pattern> pattern_;
  bool whole_first_;
  bool look_whole_;  // merging alone would miss some tokens
  ScanFn scan_ = nullptr;
  mutable std::unique_ptr<Worker> workers_[kWorkers];
  mutable std::atomic<bool> busy_[kWorkers] = {};
};

}  // namespace fastgpt::bpe
