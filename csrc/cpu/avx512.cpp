// The AVX-512 table: vectors of sixteen floats (F, BW, DQ, VL: every server chip since Skylake-SP, Zen 4 and later).
#include "cpu/includes.h"

#if defined(FASTGPT_X86)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define FASTGPT_LANES 16
#define FASTGPT_ISA "avx512f"

#include "cpu/engine.inl"

namespace fastgpt::cpu {
const Kernels* avx512_kernels() {
  static const bool available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return available ? &kTable : nullptr;
}
}  // namespace fastgpt::cpu
#else
namespace fastgpt::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace fastgpt::cpu
#endif
