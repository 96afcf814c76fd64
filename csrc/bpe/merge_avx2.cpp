// Merging in step for AVX2.
#include <algorithm>
#include <bit>
#include <cstring>

#include "bpe/merge_lanes.h"

#if defined(__x86_64__)

#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")

namespace fastgpt::bpe {
namespace {

#include "bpe/merge_lanes.inl"

}  // namespace

MergeLanes avx2_merge_lanes() {
  const bool there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
  return there ? &merge_lanes : nullptr;
}

}  // namespace fastgpt::bpe

#else

fastgpt::bpe::MergeLanes fastgpt::bpe::avx2_merge_lanes() { return nullptr; }

#endif
