// The AVX-512 table with products of bf16 tiles (AMX_BF16: Sapphire Rapids and later): attention in bf16 and linear
// layers whose products may be of bf16 are its own, everything else is the table's with bf16 pairs.
#include "cpu/includes.h"

#if defined(FASTGPT_X86) && defined(__x86_64__) && defined(__linux__) && __GNUC__ >= 11
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC target( \
    "amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define FASTGPT_LANES 16
#define FASTGPT_BF16_DOT 1
#define FASTGPT_AMX 1

namespace fastgpt::cpu {
namespace {

// clang-format off: each needs those before it
#include "cpu/vec.inl"
#include "cpu/vec_math.inl"
#include "cpu/memory.inl"
#include "cpu/parallel.inl"

#include "cpu/philox.inl"

#include "cpu/attention.inl"
#include "cpu/activation.inl"
#include "cpu/product.inl"
#include "cpu/linear_few_rows.inl"
#include "cpu/linear.inl"
// clang-format on

// Whether the chip has the tiles and the system lets this process use them, which Linux wants to be asked for.
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  if ((d & kBFloat16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const Kernels* avx512amx_kernels() {
  static const bool available = avx512bf16_kernels() != nullptr && may_use_tiles();
  static const Kernels table = [] {
    Kernels made = {};
    if (available) made = *avx512bf16_kernels();
    made.isa = "avx512amx";
    made.attention = [](const AttentionArgs& a, int threads) {
      (a.dtype == DType::kBFloat16 ? attention : avx512bf16_kernels()->attention)(a, threads);
    };
    made.attention_backward = [](const AttentionBackwardArgs& a, int threads) {
      (a.dtype == DType::kBFloat16 ? attention_backward : avx512bf16_kernels()->attention_backward)(a, threads);
    };
    made.activation = activation;
    made.activation_backward = activation_backward;
    made.linear = [](const LinearArgs& a, int threads) {
      (a.half && a.rows > kFewRows ? linear : avx512bf16_kernels()->linear)(a, threads);
    };
    made.linear_backward_input = [](const LinearBackwardInputArgs& a, int threads) {
      (a.half && a.rows > kFewRows ? linear_backward_input : avx512bf16_kernels()->linear_backward_input)(a, threads);
    };
    made.linear_backward_weight = [](const LinearBackwardWeightArgs& a, int threads) {
      (a.half ? linear_backward_weight : avx512bf16_kernels()->linear_backward_weight)(a, threads);
    };
    return made;
  }();
  return available ? &table : nullptr;
}

}  // namespace fastgpt::cpu
#else
namespace fastgpt::cpu {
const Kernels* avx512amx_kernels() { return nullptr; }
}  // namespace fastgpt::cpu
#endif
