// The scanners for AVX-512 (F, BW).
#include <algorithm>

#include "bpe/scan_token.h"
#include "bpe/scanner_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,bmi,bmi2,lzcnt,popcnt")

namespace fastgpt::bpe {
namespace {

constexpr char kIsaName[] = "avx512";

#include "bpe/classify_avx512.inl"
#include "bpe/scan_simd.inl"

}  // namespace

const ScannerTable* avx512_scanners() {
  if (const ScannerTable* const better = avx512_vbmi2_scanners()) return better;
  const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  return there ? &kTable : nullptr;
}

}  // namespace fastgpt::bpe

#else

const fastgpt::bpe::ScannerTable* fastgpt::bpe::avx512_scanners() { return nullptr; }

#endif
