#include "bpe/scanner_isa.h"
namespace fastgpt::bpe {
const ScannerTable* avx2_scanners() { return nullptr; }
}  // namespace fastgpt::bpe
