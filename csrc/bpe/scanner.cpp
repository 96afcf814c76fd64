#include "bpe/scanner.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "bpe/scan_token.h"
#include "bpe/scanner_isa.h"

namespace fastgpt::bpe {
namespace {

template <class Token>
size_t scan(const uint8_t* text, size_t size, size_t pos, uint32_t* ends, size_t capacity) {
  const uint8_t* const end = text + size;
  const uint8_t* p = text + pos;
  size_t n = 0;
  while (p < end && n < capacity) {
    p = Token::next(p, end);
    ends[n++] = static_cast<uint32_t>(p - text);
  }
  return n;
}

constexpr ScannerTable kPortable = {
    "portable",
    {scan<Gpt2Token>, scan<Cl100kToken<3, true>>, scan<O200kToken>, scan<Cl100kToken<3, false>>,
     scan<Cl100kToken<1, false>>},
};

// The table of an instruction set; empty: the best that the machine has.
const ScannerTable& table_for(const std::string& isa) {
  const ScannerTable* const avx512 = avx512_scanners();
  const ScannerTable* const avx2 = avx2_scanners();
  if (isa.empty()) return avx512 ? *avx512 : avx2 ? *avx2 : kPortable;
  const ScannerTable* const found = isa == "portable" ? &kPortable
                                    : isa == "avx2"   ? avx2
                                    : isa == "avx512" ? avx512
                                                      : nullptr;
  if (found) return *found;
  if (isa == "avx2" || isa == "avx512") throw std::invalid_argument("FASTGPT_CPU_ISA: this machine has no " + isa);
  throw std::invalid_argument("FASTGPT_CPU_ISA: got \"" + isa + "\", expected portable, avx2 or avx512");
}

const ScannerTable& table() {
  static const ScannerTable& chosen = [&]() -> const ScannerTable& {
    const char* const wanted = std::getenv("FASTGPT_CPU_ISA");
    const std::string isa = wanted ? wanted : "";
    for (const char* narrower : {"avx512f", "avx512bf16", "avx512amx"}) {  // of the CPU engine, which names them apart
      if (isa == narrower) return table_for("avx512");
    }
    return table_for(isa);
  }();
  return chosen;
}

bool is_ascii_letter(uint8_t c) { return (c | 0x20) >= 'a' && (c | 0x20) <= 'z'; }

}  // namespace

Pattern pattern_from_name(std::string_view name) {
  if (name == "gpt2") return Pattern::kGpt2;
  if (name == "cl100k_base") return Pattern::kCl100k;
  if (name == "o200k_base") return Pattern::kO200k;
  if (name == "llama3") return Pattern::kLlama3;
  if (name == "qwen2") return Pattern::kQwen2;
  throw std::invalid_argument("pattern: got \"" + std::string(name) +
                              "\", expected gpt2, cl100k_base, o200k_base, llama3 or qwen2");
}

ScanFn scanner_for(Pattern pattern) { return table().scan[static_cast<size_t>(pattern)]; }

ScanFn scanner_for(Pattern pattern, const std::string& isa) {
  return table_for(isa).scan[static_cast<size_t>(pattern)];
}

const char* scanner_isa() { return table().name; }

size_t safe_cut(const uint8_t* text, size_t size, size_t limit) {
  // A cut at `at` looks at text[at - 2] to text[at + 1].
  for (size_t at = limit < size ? limit : size; at >= 2; --at) {
    if (at + 1 >= size) continue;
    if (text[at] == ' ' && is_ascii_letter(text[at - 1]) && is_ascii_letter(text[at + 1])) return at;
    // The line feed must be a whole run of white space: `\s++$` would otherwise take a longer run at the cut.
    if (text[at - 1] == '\n' && text[at - 2] > ' ' && text[at - 2] < 0x7F) {
      if (is_ascii_letter(text[at]) || (text[at] >= '0' && text[at] <= '9')) return at;
    }
  }
  return 0;
}

}  // namespace fastgpt::bpe
