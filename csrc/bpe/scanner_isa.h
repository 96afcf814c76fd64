// The scanners of each instruction set: one table a file, chosen at run time by scanner.cpp.
#pragma once

#include "bpe/scanner.h"

namespace fastgpt::bpe {

inline constexpr size_t kPatterns = 5;

struct ScannerTable {
  const char* name;
  ScanFn scan[kPatterns];  // by Pattern
};

// Null where the machine lacks the instructions (or the compiler targets another architecture).
const ScannerTable* avx2_scanners();
const ScannerTable* avx512_scanners();
const ScannerTable* avx512_vbmi2_scanners();  // what avx512_scanners gives where it can

}  // namespace fastgpt::bpe
