// Picks the function table once: the widest instruction set the chip has, or the one FASTGPT_CPU_ISA names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastgpt::cpu {
namespace {

std::atomic<const Kernels*> active{nullptr};

// The tables that this chip has, from the narrowest on.
const std::vector<const Kernels*>& tables() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> all;
    for (const Kernels* table :
         {portable_kernels(), avx2_kernels(), avx512_kernels(), avx512bf16_kernels(), avx512amx_kernels()}) {
      if (table != nullptr) all.push_back(table);
    }
    return all;
  }();
  return found;
}

const Kernels* choose(const std::string& name) {
  if (name.empty()) return tables().back();
  const Kernels* chosen = nullptr;
  for (const Kernels* table : tables()) {
    const std::string isa = table->isa;
    if (isa == name || (name == "avx512" && isa.starts_with(name))) chosen = table;  // the last one: the widest
  }
  if (chosen != nullptr) return chosen;
  for (const char* known : {"portable", "avx2", "avx512", "avx512f", "avx512bf16", "avx512amx"}) {
    if (name == known) throw std::invalid_argument("FASTGPT_CPU_ISA: this chip or this build has no " + name);
  }
  throw std::invalid_argument("FASTGPT_CPU_ISA: got '" + name + "', expected portable, avx2 or avx512");
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

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : tables()) names.emplace_back(table->isa);
  return names;
}

void select_isa(const std::string& name) { active.store(choose(name), std::memory_order_release); }

}  // namespace fastgpt::cpu
