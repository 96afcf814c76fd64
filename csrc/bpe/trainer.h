// Trains byte-level BPE: counts pre-tokens, then joins the most frequent pair of neighbours again and again.
//
// The definition is minbpe's: ids 0 to 255 are the bytes, step i joins everywhere, from left to right, the pair of ids
// that occurs most often inside pre-tokens (overlapping occurrences count) into id 256 + i. Ties: the smaller left id,
// then the smaller right id. The result does not depend on the order of the texts or the number of threads.
//
// Only distinct pre-tokens are stored, with how often they occurred, so memory follows the number of different words
// and not the size of the text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "bpe/scanner.h"

namespace fastgpt::bpe {

class WordCounts;

class Trainer {
 public:
  // pattern: none where the pre-tokens are given. threads >= 1.
  Trainer(std::optional<Pattern> pattern, size_t threads);
  ~Trainer();

  // Counts the pre-tokens of texts. A text may be given in parts that end at a safe_cut.
  void feed(const std::vector<std::string_view>& texts);
  // Counts the pre-tokens text[begins[i], ends[i]).
  void feed_spans(std::string_view text, const uint64_t* begins, const uint64_t* ends, size_t count);

  // Joins up to `merges` pairs, none rarer than min_frequency >= 1; fewer when no such pair is left. progress, called
  // now and then with how many are done, may throw to stop. Uses up what was counted.
  std::vector<std::pair<uint32_t, uint32_t>> train(size_t merges, uint64_t min_frequency,
                                                   const std::function<void(size_t)>& progress);

  size_t distinct_words() const;  // after train: of the training

 private:
  ScanFn scan_ = nullptr;
  std::vector<std::unique_ptr<WordCounts>> counts_;  // one a thread
  size_t distinct_words_ = 0;
};

}  // namespace fastgpt::bpe
