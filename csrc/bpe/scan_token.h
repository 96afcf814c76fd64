// Where the pre-token that starts at a given place ends, one function a pattern: hand-written equivalents of the
// regular expressions in fastgpt/tokenizer/patterns.py, scalar, for any bytes.
//
// None of the patterns looks behind, so a match depends on nothing before its start: scanning may begin at any known
// boundary. The text's end takes part (`$` and `(?!\S)`), so the text must be whole, or cut where a boundary is certain
// (safe_cut in scanner.h).
#pragma once

#include "bpe/unicode.h"

namespace fastgpt::bpe {

// The end of the longest run from p of characters whose class is in `set`.
inline const uint8_t* skip_run(const uint8_t* p, const uint8_t* end, uint8_t set) {
  while (p < end) {
    if (*p < 0x80) {
      if (!(kUnicodeClasses[*p] & set)) break;
      ++p;
    } else {
      const Char c = wide_char_at(p, end);
      if (!(c.cls & set)) break;
      p += c.length;
    }
  }
  return p;
}

// The length of a contraction ('s 't 're 've 'm 'll 'd) at p, which holds an apostrophe, or 0. With kFold, case does
// not matter; U+017F folds to s.
template <bool kFold>
inline size_t contraction_length(const uint8_t* p, const uint8_t* end) {
  const size_t left = static_cast<size_t>(end - p);
  if (left < 2) return 0;
  const uint8_t fold = kFold ? 0x20 : 0;
  const uint8_t first = p[1] | fold;
  if (first == 's' || first == 'd' || first == 'm' || first == 't') return 2;
  if (left < 3) return 0;
  if (kFold && p[1] == 0xC5 && p[2] == 0xBF) return 3;
  const uint8_t second = p[2] | fold;
  if (first == 'l' && second == 'l') return 3;
  if ((first == 'v' || first == 'r') && second == 'e') return 3;
  return 0;
}

// White space from p, where no other alternative matches: `\s+(?!\S)|\s`, and before it, with kLines, `\s*[\r\n]`.
// kEndFirst puts `\s++$` in front of both.
template <bool kLines, bool kEndFirst>
inline const uint8_t* white_token(const uint8_t* p, const uint8_t* end) {
  const uint8_t* const start = p;
  const uint8_t* last = p;              // start of the run's last character
  const uint8_t* after_line = nullptr;  // after the run's last CR or LF
  while (p < end) {
    const Char c = char_at(p, end);
    if (!(c.cls & kWhite)) break;
    last = p;
    p += c.length;
    if (c.cls & kNewline) after_line = p;
  }
  if (kEndFirst && p == end) return p;
  if (kLines && after_line) return after_line;
  if (p == end) return p;
  return last > start ? last : p;
}

// '(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s
struct Gpt2Token {
  static const uint8_t* next(const uint8_t* p, const uint8_t* end) {
    if (*p == '\'') {
      if (const size_t n = contraction_length<false>(p, end)) return p + n;
    }
    const uint8_t* q = *p == ' ' ? p + 1 : p;
    const Char c = char_at(q, end);
    if (c.cls & kLetters) return skip_run(q + c.length, end, kLetters);
    if (c.cls & kSymbols) return skip_run(q + c.length, end, kSymbols);
    if (c.cls & kNumber) return skip_run(q + c.length, end, kNumber);
    return white_token<false, true>(p, end);
  }
};

// '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s
// kDigits is the 3; without kEndFirst, `\s++$` is not there (the form of the pattern that other tokenizers took over).
template <int kDigits, bool kEndFirst>
struct Cl100kToken {
  static const uint8_t* next(const uint8_t* p, const uint8_t* end) {
    if (*p == '\'') {
      if (const size_t n = contraction_length<true>(p, end)) return p + n;
    }
    const Char c = char_at(p, end);
    if (c.cls & kLetters) return skip_run(p + c.length, end, kLetters);
    const uint8_t* q = p + c.length;
    if (c.cls & kNumber) {
      for (int i = 1; i < kDigits; ++i) {
        const Char d = char_at(q, end);
        if (!(d.cls & kNumber)) break;
        q += d.length;
      }
      return q;
    }
    const Char d = char_at(q, end);
    if ((c.cls & kPrefix) && (d.cls & kLetters)) return skip_run(q + d.length, end, kLetters);
    if ((c.cls & kSymbols) || (*p == ' ' && (d.cls & kSymbols))) {
      return skip_run(skip_run(q, end, kSymbols), end, kNewline);
    }
    return white_token<true, kEndFirst>(p, end);
  }
};

// [^\r\n\p{L}\p{N}]?U*L+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?U+L*(?i:...)?|\p{N}{1,3}|
// ?[^\s\p{L}\p{N}]+[\r\n/]*
// |\s*[\r\n]+|\s+(?!\S)|\s+     with U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] and L = [\p{Ll}\p{Lm}\p{Lo}\p{M}]
struct O200kToken {
  static const uint8_t* next(const uint8_t* p, const uint8_t* end) {
    const Char c = char_at(p, end);
    const uint8_t* q = c.cls & kPrefix ? p + c.length : p;
    if (const uint8_t* word = word_end(p, q, end)) {
      return word < end && *word == '\'' ? word + contraction_length<true>(word, end) : word;
    }
    q = p + c.length;
    if (c.cls & kNumber) {
      for (int i = 1; i < 3; ++i) {
        const Char d = char_at(q, end);
        if (!(d.cls & kNumber)) break;
        q += d.length;
      }
      return q;
    }
    if ((c.cls & kSymbols) || (*p == ' ' && (char_at(q, end).cls & kSymbols))) {
      q = skip_run(q, end, kSymbols);
      while (q < end && (*q == '\r' || *q == '\n' || *q == '/')) ++q;
      return q;
    }
    return white_token<true, false>(p, end);
  }

 private:
  // The end of a match of the first two alternatives, without the contraction, whose prefix is [p, q), or null.
  // U* is greedy and gives characters back until L+ can have one: the last of them that is in both sets.
  static const uint8_t* word_end(const uint8_t* p, const uint8_t* q, const uint8_t* end) {
    const uint8_t* after_common = nullptr;  // after the last character of U* that L also has
    const uint8_t* u = q;
    while (u < end) {
      const Char c = char_at(u, end);
      if (!(c.cls & kUpperOrCommon)) break;
      u += c.length;
      if (c.cls & kCommon) after_common = u;
    }
    const uint8_t* const lower = skip_run(u, end, kLowerOrCommon);
    if (lower > u) return lower;
    if (after_common) return after_common;
    // Without the prefix, a mark can be the word itself: it is in U and in L.
    if (q > p && (char_at(p, end).cls & kMark)) return q;
    return u > q ? u : nullptr;
  }
};

}  // namespace fastgpt::bpe
