// Pre-tokenizers: they cut a text into pre-tokens, the pieces that byte pairs are merged in.
//
// A scanner writes the ends of successive pre-tokens (offsets from the text's begin); together they cover the text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace fastgpt::bpe {

enum class Pattern : uint8_t { kGpt2, kCl100k, kO200k, kLlama3, kQwen2 };

// Throws std::invalid_argument naming the known ones.
Pattern pattern_from_name(std::string_view name);

// Scans text[pos, size) from the boundary `pos` on until the text ends or `capacity` ends are written. Returns how many
// were written; the last of them is where to go on. size is at most kMaxScanBytes, capacity at least kMinScanCapacity.
using ScanFn = size_t (*)(const uint8_t* text, size_t size, size_t pos, uint32_t* ends, size_t capacity);
inline constexpr size_t kMinScanCapacity = 128;
inline constexpr size_t kMaxScanBytes = size_t{1} << 30;  // offsets have 32 bits

// The scanner of this machine's instruction set, or of FASTGPT_CPU_ISA=portable|avx2|avx512. Throws
// std::invalid_argument for an unknown name or one that the machine lacks.
ScanFn scanner_for(Pattern pattern);

// The scanner of a given instruction set, for tests of all in one process. Throws std::invalid_argument as above.
ScanFn scanner_for(Pattern pattern, const std::string& isa);

// "portable", "avx2" or "avx512": what scanner_for chooses.
const char* scanner_isa();

// The largest position <= limit of text[0, size) that is a pre-token boundary in every built-in pattern whatever comes
// before and after, or 0 when there is none: before the space in "letter, one space, letter" (ASCII), and after a line
// feed that a letter or digit follows. Texts may be cut there and scanned apart.
size_t safe_cut(const uint8_t* text, size_t size, size_t limit);

}  // namespace fastgpt::bpe
