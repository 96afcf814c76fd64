// Code points of UTF-8 text and their classes.
//
// A class is one bit, a set of classes a mask of them. Invalid UTF-8 is not an error here: every byte that does not
// belong to a well-formed sequence counts as one character of class kOther, so that any bytes can be encoded and decode
// to themselves.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bpe/unicode_tables.h"

namespace fastgpt::bpe {

enum CharClass : uint8_t {
  kOther = 1,     // neither letter, number, mark nor white space
  kUpper = 2,     // Lu, Lt
  kLower = 4,     // Ll
  kLetter = 8,    // Lm, Lo
  kMark = 16,     // Mn, Mc, Me
  kNumber = 32,   // Nd, Nl, No
  kSpace = 64,    // White_Space without CR and LF
  kNewline = 128  // CR, LF
};

inline constexpr uint8_t kLetters = kUpper | kLower | kLetter;       // \p{L}
inline constexpr uint8_t kWhite = kSpace | kNewline;                 // \s
inline constexpr uint8_t kSymbols = kOther | kMark;                  // [^\s\p{L}\p{N}]
inline constexpr uint8_t kPrefix = kSymbols | kSpace;                // [^\r\n\p{L}\p{N}]
inline constexpr uint8_t kUpperOrCommon = kUpper | kLetter | kMark;  // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
inline constexpr uint8_t kLowerOrCommon = kLower | kLetter | kMark;  // [\p{Ll}\p{Lm}\p{Lo}\p{M}]
inline constexpr uint8_t kCommon = kUpperOrCommon & kLowerOrCommon;  // in both

constexpr uint8_t class_of(uint32_t code_point) {
  const uint32_t block = kUnicodeIndex[code_point / kUnicodeBlock];
  return kUnicodeClasses[block * kUnicodeBlock + code_point % kUnicodeBlock];
}

struct Char {
  uint8_t cls;     // one CharClass, or 0 at the end of the text: it is in no set
  uint8_t length;  // bytes; 0 at the end of the text
};

inline bool is_continuation(uint8_t byte) { return (byte & 0xC0) == 0x80; }

// The character of more than one byte at p < end.
inline Char wide_char_at(const uint8_t* p, const uint8_t* end) {
  const uint8_t lead = *p;
  const size_t left = static_cast<size_t>(end - p);
  if (lead >= 0xE0) {
    if (left < 3 || !is_continuation(p[1]) || !is_continuation(p[2])) return {kOther, 1};
    if (lead < 0xF0) {
      const uint32_t cp = (lead & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
      if (cp < 0x800 || (cp >= 0xD800 && cp < 0xE000)) return {kOther, 1};
      return {class_of(cp), 3};
    }
    if (left < 4 || !is_continuation(p[3])) return {kOther, 1};
    const uint32_t cp = (lead & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
    if (lead > 0xF4 || cp < 0x10000 || cp > 0x10FFFF) return {kOther, 1};
    return {class_of(cp), 4};
  }
  if (lead < 0xC2 || left < 2 || !is_continuation(p[1])) return {kOther, 1};
  return {class_of((lead & 0x1Fu) << 6 | (p[1] & 0x3Fu)), 2};
}

// The character at p, or {0, 0} when p is the end.
inline Char char_at(const uint8_t* p, const uint8_t* end) {
  if (p >= end) return {0, 0};
  if (*p < 0x80) return {kUnicodeClasses[*p], 1};  // block 0 is ASCII
  return wide_char_at(p, end);
}

}  // namespace fastgpt::bpe
