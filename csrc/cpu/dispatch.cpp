// Picks the function table once: the widest instruction set the chip has, or the one FASTGPT_CPU_ISA names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fastgpt::cpu {
namespace {

std::atomic<const Kernels*> active{nullptr};

const Kernels* choose(const std::string& name) {
  if (name.empty()) {
    if (const Kernels* table = avx512bf16_kernels()) return table;
    if (const Kernels* table = avx512_kernels()) return table;
    if (const Kernels* table = avx2_kernels()) return table;
    return portable_kernels();
  }
  const Kernels* table = nullptr;
  if (name == "avx512") {
    table = avx512bf16_kernels() != nullptr ? avx512bf16_kernels() : avx512_kernels();
  } else if (name == "avx512f") {  // without bf16 products, so that a chip that has them tests the other table too
    table = avx512_kernels();
  } else if (name == "avx2") {
    table = avx2_kernels();
  } else if (name == "portable") {
    table = portable_kernels();
  } else {
    throw std::invalid_argument("FASTGPT_CPU_ISA: got '" + name + "', expected portable, avx2 or avx512");
  }
  if (table == nullptr) throw std::invalid_argument("FASTGPT_CPU_ISA: this chip or this build has no " + name);
  return table;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = active.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* name = std::getenv("FASTGPT_CPU_ISA");
    table = choose(name == nullptr ? "" : name);
    active.store(table, std::memory_order_release);
  }
  return *table;
}

void select_isa(const char* name) { active.store(choose(name), std::memory_order_release); }

}  // namespace fastgpt::cpu
