// Merging in step for AVX-512 (F, BW, DQ, VL).
#include <algorithm>
#include <bit>
#include <cstring>

#include "bpe/merge_lanes.h"

#if defined(__x86_64__)

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,bmi,bmi2,lzcnt,popcnt")

namespace fastgpt::bpe {
namespace {

#include "bpe/merge_lanes.inl"

}  // namespace

MergeLanes avx512_merge_lanes() {
  const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
  return there ? &merge_lanes : nullptr;
}

}  // namespace fastgpt::bpe

#else

fastgpt::bpe::MergeLanes fastgpt::bpe::avx512_merge_lanes() { return nullptr; }

#endif
