// The AVX2 table: vectors of eight floats, with FMA.
#include "cpu/includes.h"

#if defined(FASTGPT_X86)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define FASTGPT_LANES 8
#define FASTGPT_ISA "avx2"

#include "cpu/engine.inl"

namespace fastgpt::cpu {
const Kernels* avx2_kernels() {
  static const bool available = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return available ? &kTable : nullptr;
}
}  // namespace fastgpt::cpu
#else
namespace fastgpt::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fastgpt::cpu
#endif
