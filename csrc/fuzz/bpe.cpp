// Fuzz target of the tokenizer: whatever the bytes, nothing reads out of bounds, and every fast way gives what the
// definition gives. Where it does not, the process aborts with a line that says what differed.
//
// The interface is libFuzzer's, so with clang:
//   clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -Icsrc csrc/fuzz/bpe.cpp csrc/bpe/*.cpp -pthread
// Without it, csrc/fuzz/driver.cpp makes the inputs (csrc/fuzz/run builds and runs both).
//
// Byte 0 of an input chooses the pattern, byte 1 how often the text is repeated (encoding copies short texts), byte 2
// where texts are cut; the rest is the text.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bpe/encoder.h"
#include "bpe/scanner.h"
#include "bpe/special.h"
#include "bpe/trainer.h"
#include "bpe/vocabulary.h"

using namespace fastgpt::bpe;

namespace {

using Ids = std::vector<uint32_t>;
using Spans = std::vector<size_t>;  // the ends of pre-tokens
using Merges = std::vector<std::pair<uint32_t, uint32_t>>;
using Tokens = std::vector<std::pair<std::string, uint32_t>>;

constexpr size_t kNaiveBytes = 400;  // the definitions below are quadratic
constexpr size_t kPatterns = 5;

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

const uint8_t* as_bytes(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

// A copy that ends where its memory ends, so that the sanitizer sees a read behind it.
struct Exact {
  explicit Exact(std::string_view text) : size(text.size()), data(new char[std::max<size_t>(size, 1)]) {
    std::memcpy(data.get(), text.data(), size);
  }
  std::string_view view() const { return {data.get(), size}; }
  size_t size;
  std::unique_ptr<char[]> data;
};

// ---- the definitions

// A vocabulary as maps; with a list of merges, by pairs, else by the joined bytes.
struct Naive {
  std::map<std::string, uint32_t, std::less<>> ids;
  std::map<uint32_t, std::string> bytes;
  std::map<std::pair<uint32_t, uint32_t>, uint32_t> ranks;
  bool whole_first = true;

  Naive(const Tokens& tokens, const Merges& merges, bool whole) : whole_first(whole) {
    for (const auto& [token, id] : tokens) {
      ids[token] = id;
      bytes[id] = token;
    }
    for (uint32_t i = 0; i < merges.size(); ++i) ranks.emplace(merges[i], i);
  }

  void encode(std::string_view piece, Ids& out) const {
    if (const auto whole = ids.find(piece); whole_first && whole != ids.end()) {
      out.push_back(whole->second);
      return;
    }
    std::vector<std::string> parts;
    for (const char c : piece) parts.emplace_back(1, c);
    for (;;) {
      size_t at = parts.size();
      uint32_t best = kNone;
      for (size_t i = 0; i + 1 < parts.size(); ++i) {
        uint32_t rank = kNone;
        if (ranks.empty()) {
          if (const auto found = ids.find(parts[i] + parts[i + 1]); found != ids.end()) rank = found->second;
        } else if (const auto found = ranks.find({ids.at(parts[i]), ids.at(parts[i + 1])}); found != ranks.end()) {
          rank = found->second;
        }
        if (rank < best) {
          best = rank;
          at = i;
        }
      }
      if (best == kNone) break;
      parts[at] += parts[at + 1];
      parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    for (const auto& part : parts) out.push_back(ids.at(part));
  }
};

// minbpe's training: counts all pairs anew at every step.
Merges naive_train(const std::vector<std::string>& words, size_t merges) {
  std::vector<Ids> symbols;
  for (const auto& word : words) symbols.emplace_back(as_bytes(word), as_bytes(word) + word.size());
  Merges found;
  while (found.size() < merges) {
    std::map<std::pair<uint32_t, uint32_t>, size_t> counts;
    for (const auto& word : symbols) {
      for (size_t i = 0; i + 1 < word.size(); ++i) ++counts[{word[i], word[i + 1]}];
    }
    std::pair<uint32_t, uint32_t> best;
    size_t most = 0;
    for (const auto& [pair, count] : counts) {  // ascending, so the first of equals is the smallest
      if (count > most) {
        most = count;
        best = pair;
      }
    }
    if (!most) break;
    const uint32_t joined = 256 + static_cast<uint32_t>(found.size());
    found.push_back(best);
    for (auto& word : symbols) {
      Ids shorter;
      for (size_t i = 0; i < word.size(); ++i) {
        const bool pair = i + 1 < word.size() && word[i] == best.first && word[i + 1] == best.second;
        shorter.push_back(pair ? joined : word[i]);
        i += pair;
      }
      word.swap(shorter);
    }
  }
  return found;
}

// ---- vocabularies

Tokens tokens_of(const Merges& merges) {
  Tokens tokens;
  for (uint32_t byte = 0; byte < 256; ++byte) tokens.emplace_back(std::string(1, static_cast<char>(byte)), byte);
  for (const auto& [left, right] : merges) {
    tokens.emplace_back(tokens[left].first + tokens[right].first, static_cast<uint32_t>(tokens.size()));
  }
  return tokens;
}

// Words of several scripts, long runs and long words, so that the vocabulary has tokens of every length.
Merges learned_merges() {
  const std::string text =
      "The quick brown fox jumps over the lazy dog; don't you think it's 1234567 times better? THE END'S NEAR\n\n"
      "    def function_name(self, argument=None):\n        return self.argument\r\n\t// ---------------------------\n"
      "Internationalisierung internationalization Donaudampfschifffahrtsgesellschaft ================================\n"
      "Größe naïveté Ελληνικά ελληνικά русский язык 中文字符测试 日本語テキスト ภาษาไทย हिन्दी العربية 🙂🇺🇸 한국어 "
      "e\u0301\n";
  Trainer trainer(Pattern::kCl100k, 1);
  trainer.feed({text, text, text});
  return trainer.train(700, 1, [](size_t) {});
}

struct Case {
  Case(const Tokens& tokens, const Merges& merges, Pattern pattern, bool whole)
      : naive(tokens, merges, whole), encoder(Vocabulary(tokens, merges), pattern, whole) {}
  Naive naive;
  Encoder encoder;
};

Case& learned_case(Pattern pattern, bool by_merges) {
  static std::unique_ptr<Case> cases[kPatterns][2];
  auto& found = cases[static_cast<size_t>(pattern)][by_merges];
  if (!found) {
    static const Merges merges = learned_merges();
    found = std::make_unique<Case>(tokens_of(merges), by_merges ? merges : Merges{}, pattern, !by_merges);
  }
  return *found;
}

// Tokens cut out of the text, with ids as they come: nothing says that they can be reached by merging. With listed,
// some pairs of them are joined too.
std::unique_ptr<Case> made_case(std::string_view text, Pattern pattern, bool listed) {
  Tokens tokens = tokens_of({});
  std::map<std::string, uint32_t> ids(tokens.begin(), tokens.end());
  auto add = [&](const std::string& token) {
    if (!ids.emplace(token, static_cast<uint32_t>(tokens.size())).second) return;
    tokens.emplace_back(token, static_cast<uint32_t>(tokens.size()));
  };
  for (size_t at = 0; at + 1 < text.size() && tokens.size() < 330; ++at) {
    add(std::string(text.substr(at, 2 + as_bytes(text)[at] % 23)));
  }
  Merges merges;
  for (size_t at = 0; listed && at + 1 < text.size() && merges.size() < 60; ++at) {
    const uint32_t left = static_cast<uint32_t>(at * 7 % tokens.size()), right = as_bytes(text)[at + 1];
    if (tokens[left].first.size() > 40) continue;
    add(tokens[left].first + tokens[right].first);
    merges.emplace_back(left, right);
  }
  return std::make_unique<Case>(tokens, merges, pattern, as_bytes(text)[0] & 1);
}

// ---- the checks

Spans scan_all(ScanFn scan, std::string_view text) {
  uint32_t ends[kMinScanCapacity];
  Spans spans;
  for (size_t pos = 0; pos < text.size(); pos = spans.back()) {
    const size_t n = scan(as_bytes(text), text.size(), pos, ends, kMinScanCapacity);
    check(n > 0 && n <= kMinScanCapacity, "a scanner wrote no end, or too many");
    spans.insert(spans.end(), ends, ends + n);
  }
  return spans;
}

Spans check_scanners(std::string_view text, Pattern pattern, size_t cut_limit) {
  const Spans expected = scan_all(scanner_for(pattern, "portable"), text);
  for (size_t i = 0, before = 0; i < expected.size(); before = expected[i++]) {
    check(expected[i] > before && expected[i] <= text.size(), "the ends of pre-tokens do not ascend");
  }
  check(text.empty() || expected.back() == text.size(), "the pre-tokens do not cover the text");
  for (const char* isa : {"avx2", "avx512"}) {
    try {
      check(scan_all(scanner_for(pattern, isa), text) == expected, "a vector scanner differs from the portable one");
    } catch (const std::invalid_argument&) {
      continue;  // not on this machine
    }
  }
  const size_t cut = safe_cut(as_bytes(text), text.size(), cut_limit);
  check(cut <= cut_limit, "safe_cut is above its limit");
  const Exact head(text.substr(0, cut)), tail(text.substr(cut));
  Spans parts = scan_all(scanner_for(pattern), head.view());
  for (const size_t end : scan_all(scanner_for(pattern), tail.view())) parts.push_back(cut + end);
  check(parts == expected, "a text cut at safe_cut has other pre-tokens");
  return expected;
}

Ids ids_of(const IdBuffer& buffer) { return {buffer.data(), buffer.data() + buffer.size()}; }

// Short pre-tokens merged in step, by every instruction set.
void check_merging(const Case& with, std::string_view text, const Spans& spans) {
  const Vocabulary& vocabulary = with.encoder.vocabulary();
  if (vocabulary.pairs().empty()) return;
  std::string padded(text);
  padded.append(Vocabulary::kPadding, '\0');
  Naive merging = with.naive;
  merging.whole_first = false;
  std::vector<MergeJob> jobs;
  std::vector<Ids> expected, got;
  for (size_t i = 0, begin = 0; i < spans.size(); begin = spans[i++]) {
    const size_t size = spans[i] - begin;
    if (size > MergeJob::kMaxBytes) continue;
    merging.encode(text.substr(begin, size), expected.emplace_back());
    jobs.push_back({as_bytes(padded) + begin, static_cast<uint32_t>(size), 0, got.emplace_back(size).data()});
  }
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    const MergeLanes lanes = merge_lanes_of(isa);
    if (!lanes) continue;  // not on this machine
    lanes(vocabulary.merge_rule(), jobs.data(), jobs.size());
    for (size_t i = 0; i < jobs.size(); ++i) {
      check(Ids(jobs[i].ids, jobs[i].ids + jobs[i].count) == expected[i],
            "merging in step differs from the definition");
    }
  }
}

void check_encoder(const Case& with, std::string_view text, const Spans& spans, size_t cut) {
  check_merging(with, text, spans);
  const Encoder& encoder = with.encoder;
  Ids expected;
  bool defined = true;
  std::vector<uint64_t> begins, ends;
  for (size_t i = 0, begin = 0; i < spans.size(); begin = spans[i++]) {
    begins.push_back(begin);
    ends.push_back(spans[i]);
    if (spans[i] - begin > kNaiveBytes) defined = false;
    if (defined) with.naive.encode(text.substr(begin, spans[i] - begin), expected);
  }
  IdBuffer ids, again, of_spans, batch;
  encoder.encode(text, ids);
  if (defined) check(ids_of(ids) == expected, "encode differs from the definition");
  expected = ids_of(ids);
  encoder.encode(text, again);
  check(ids_of(again) == expected, "encode gives other ids from the cache");
  std::string bytes;
  for (const uint32_t id : expected) bytes += encoder.vocabulary().bytes(id);
  check(bytes == text, "the ids' bytes are not the text");
  check(encoder.count(text) == expected.size(), "count differs");
  const size_t some = expected.empty() ? 0 : cut % (expected.size() + 1);
  size_t prefix = 0;
  for (size_t i = 0; i < some; ++i) prefix += encoder.vocabulary().bytes(expected[i]).size();
  check(encoder.prefix_bytes(text, some) == prefix, "prefix_bytes differs");
  encoder.encode_spans(text, begins.data(), ends.data(), begins.size(), of_spans);
  check(ids_of(of_spans) == expected, "encode_spans differs");
  std::vector<uint64_t> pretokens;
  encoder.pretokens(text, pretokens);
  check(pretokens == ends, "pretokens differ");
  const Exact head(text.substr(0, cut)), tail(text.substr(cut));
  std::vector<uint64_t> offsets;
  encoder.encode_batch({text, head.view(), tail.view(), {}}, 2, batch, offsets);
  check(offsets.size() == 4 && offsets[3] == batch.size() && offsets[0] == expected.size(), "offsets of a batch");
  IdBuffer alone;
  encoder.encode(head.view(), alone);
  encoder.encode(tail.view(), alone);
  expected.insert(expected.end(), alone.data(), alone.data() + alone.size());
  check(ids_of(batch) == expected, "encode_batch differs");
  if (text.size() <= kNaiveBytes && !text.empty()) {
    IdBuffer piece;
    encoder.encode_piece(text, piece);
    Ids whole;
    with.naive.encode(text, whole);
    check(ids_of(piece) == whole, "encode_piece differs from the definition");
  }
}

void check_trainer(std::string_view text, Pattern pattern, const Spans& spans, size_t cut_limit) {
  std::vector<std::string> words;
  for (size_t i = 0, begin = 0; i < spans.size(); begin = spans[i++])
    words.emplace_back(text.substr(begin, spans[i] - begin));
  const size_t cut = safe_cut(as_bytes(text), text.size(), cut_limit);
  const Exact head(text.substr(0, cut)), tail(text.substr(cut));
  Trainer trainer(pattern, 2);
  trainer.feed({head.view(), tail.view()});
  check(trainer.train(24, 1, [](size_t) {}) == naive_train(words, 24), "training differs from the definition");
}

void check_specials(std::string_view text, size_t cut) {
  const Tokens tokens = {{"<|a|>", 1}, {"<|a", 2}, {std::string(text.substr(0, 1 + cut % 3)), 3}};
  for (const size_t count : {size_t{1}, tokens.size()}) {
    const Tokens some(tokens.end() - static_cast<std::ptrdiff_t>(count), tokens.end());
    const SpecialFinder::Match match = SpecialFinder(some).find(text, cut);
    size_t first = std::string_view::npos, longest = 0;
    for (const auto& [token, id] : some) {
      const size_t at = text.find(token, cut);
      if (at < first || (at == first && token.size() > longest)) longest = token.size();
      first = std::min(first, at);
    }
    check(match.begin == first, "the special token found is not the first");
    check(first == std::string_view::npos || match.end == first + longest,
          "the special token found is not the longest");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 4) return 0;
  const Pattern pattern = static_cast<Pattern>(data[0] % kPatterns);
  const size_t repeats = data[1] < 200 ? 1 : data[1] - 199;
  std::string repeated;
  for (size_t i = 0; i < repeats && repeated.size() < 20'000; ++i) repeated.append(data + 3, data + size);
  const Exact exact(repeated);
  const std::string_view text = exact.view();
  const size_t cut = text.size() * data[2] / 256;

  const Spans spans = check_scanners(text, pattern, cut);
  check_encoder(learned_case(pattern, false), text, spans, cut);
  check_encoder(learned_case(pattern, true), text, spans, cut);
  // A new encoder has tables of its own to fill, so not every input gets one.
  if (text.size() <= kNaiveBytes && data[1] % 8 < 2)
    check_encoder(*made_case(text, pattern, data[1] & 1), text, spans, cut);
  if (text.size() <= kNaiveBytes && data[1] % 8 == 2) check_trainer(text, pattern, spans, cut);
  check_specials(text, cut);
  return 0;
}
