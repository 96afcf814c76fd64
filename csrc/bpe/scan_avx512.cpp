// The scanners for AVX-512 (F, BW).
#include <cstring>

#include "bpe/scan_token.h"
#include "bpe/scanner_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,bmi,bmi2,lzcnt")

namespace fastgpt::bpe {
namespace {

constexpr char kIsaName[] = "avx512";

struct Classes {
  uint64_t letters, upper, digits, space, white, newline, apostrophe, slash, high;
};

inline Classes classify(const uint8_t* p) {
  const __m512i v = _mm512_loadu_si512(p);
  auto in_range = [&](__m512i bytes, char first, char count) {
    return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(bytes, _mm512_set1_epi8(first)), _mm512_set1_epi8(count));
  };
  auto equal = [&](char byte) { return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(byte)); };
  Classes c;
  c.letters = in_range(_mm512_or_si512(v, _mm512_set1_epi8(0x20)), 'a', 26);
  c.upper = in_range(v, 'A', 26);
  c.digits = in_range(v, '0', 10);
  c.space = equal(' ');
  c.white = in_range(v, '\t', 5) | c.space;
  c.newline = equal('\n') | equal('\r');
  c.apostrophe = equal('\'');
  c.slash = equal('/');
  c.high = _mm512_movepi8_mask(v);
  return c;
}

#include "bpe/scan_simd.inl"

}  // namespace

const ScannerTable* avx512_scanners() {
  const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  return there ? &kTable : nullptr;
}

}  // namespace fastgpt::bpe

#else

const fastgpt::bpe::ScannerTable* fastgpt::bpe::avx512_scanners() { return nullptr; }

#endif
