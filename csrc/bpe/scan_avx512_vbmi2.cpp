// The scanners for AVX-512 with VBMI and VBMI2 (Ice Lake, Zen 4): tables of 128 bytes are looked into for 64 bytes at
// once, and the places of a mask's bits written all at once.
#include <algorithm>

#include "bpe/scan_token.h"
#include "bpe/scanner_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,bmi,bmi2,lzcnt,popcnt")

namespace fastgpt::bpe {
namespace {

constexpr char kIsaName[] = "avx512";

#include "bpe/classify_avx512.inl"
#include "bpe/classify_wide_vbmi.inl"

#define FASTGPT_WRITE_PLACES
// Sixteen at a time, most windows having no more.
inline size_t write_places(uint64_t mask, uint32_t base, uint32_t* out) {
  const __m512i order =
      _mm512_set_epi8(63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40,
                      39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16,
                      15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i first = _mm512_set1_epi32(static_cast<int>(base));
  const size_t count = static_cast<size_t>(__builtin_popcountll(mask));
  const __m512i places = _mm512_maskz_compress_epi8(mask, order);
  auto write = [&](__m128i sixteen, size_t at) {
    _mm512_storeu_si512(out + at, _mm512_add_epi32(first, _mm512_maskz_cvtepu8_epi32(0xFFFF, sixteen)));
  };
  write(_mm512_maskz_extracti32x4_epi32(15, places, 0), 0);  // the masks spare us a false warning of GCC's
  if (__builtin_expect(count > 16, 0)) {
    write(_mm512_maskz_extracti32x4_epi32(15, places, 1), 16);
    write(_mm512_maskz_extracti32x4_epi32(15, places, 2), 32);
    write(_mm512_maskz_extracti32x4_epi32(15, places, 3), 48);
  }
  return count;
}

#include "bpe/scan_simd.inl"

}  // namespace

const ScannerTable* avx512_vbmi2_scanners() {
  const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                     __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  return there ? &kTable : nullptr;
}

}  // namespace fastgpt::bpe

#else

const fastgpt::bpe::ScannerTable* fastgpt::bpe::avx512_vbmi2_scanners() { return nullptr; }

#endif
