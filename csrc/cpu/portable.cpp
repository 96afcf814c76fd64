// The portable table: vectors of four floats in plain GNU C++, which every 64-bit chip has.
#include "cpu/includes.h"

#define FASTGPT_LANES 4
#define FASTGPT_ISA "portable"

#include "cpu/engine.inl"

namespace fastgpt::cpu {
const Kernels* portable_kernels() { return &kTable; }
}  // namespace fastgpt::cpu
