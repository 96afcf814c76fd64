// The scanners for AVX2.
#include <algorithm>
#include <cstring>

#include "bpe/scan_token.h"
#include "bpe/scanner_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")

namespace fastgpt::bpe {
namespace {

constexpr char kIsaName[] = "avx2";

struct Classes {
  uint64_t letters, upper, digits, space, white, newline, apostrophe, slash, high;
  uint64_t common = 0;  // letters without case
  uint64_t inner = 0;   // bytes of characters but the first
};

inline uint64_t bits(__m256i a, __m256i b) {
  return uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(a))} |
         uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(b))} << 32;
}

// first <= byte < first + count, as min(byte - first, count - 1) == byte - first without signs.
inline uint64_t in_range(__m256i a, __m256i b, char first, char count) {
  const __m256i start = _mm256_set1_epi8(first), last = _mm256_set1_epi8(static_cast<char>(count - 1));
  a = _mm256_sub_epi8(a, start);
  b = _mm256_sub_epi8(b, start);
  return bits(_mm256_cmpeq_epi8(_mm256_min_epu8(a, last), a), _mm256_cmpeq_epi8(_mm256_min_epu8(b, last), b));
}

inline uint64_t equal(__m256i a, __m256i b, char byte) {
  const __m256i all = _mm256_set1_epi8(byte);
  return bits(_mm256_cmpeq_epi8(a, all), _mm256_cmpeq_epi8(b, all));
}

inline Classes classify(const uint8_t* p) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
  const __m256i fold = _mm256_set1_epi8(0x20);
  Classes c;
  c.letters = in_range(_mm256_or_si256(a, fold), _mm256_or_si256(b, fold), 'a', 26);
  c.upper = in_range(a, b, 'A', 26);
  c.digits = in_range(a, b, '0', 10);
  c.space = equal(a, b, ' ');
  c.white = in_range(a, b, '\t', 5) | c.space;
  c.newline = equal(a, b, '\n') | equal(a, b, '\r');
  c.apostrophe = equal(a, b, '\'');
  c.slash = equal(a, b, '/');
  c.high = bits(a, b);
  return c;
}

// Of fewer bytes; nothing behind them is read.
inline Classes classify_part(const uint8_t* p, size_t bytes) {
  alignas(64) uint8_t last[64] = {};
  std::memcpy(last, p, bytes);
  return classify(last);
}

#include "bpe/scan_simd.inl"

}  // namespace

const ScannerTable* avx2_scanners() {
  const bool there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  return there ? &kTable : nullptr;
}

}  // namespace fastgpt::bpe

#else

const fastgpt::bpe::ScannerTable* fastgpt::bpe::avx2_scanners() { return nullptr; }

#endif
