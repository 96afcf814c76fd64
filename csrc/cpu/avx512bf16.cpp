// The AVX-512 table with products of bf16 pairs (AVX512_BF16: Cooper Lake, Sapphire Rapids, Zen 4 and later): attention
// is its own, everything else is the AVX-512 table's.
#include "cpu/includes.h"

#if defined(FASTGPT_X86)
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define FASTGPT_LANES 16
#define FASTGPT_BF16_DOT 1

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

}  // namespace

const Kernels* avx512bf16_kernels() {
  static const Kernels table = [] {
    Kernels made = {};
    if (const Kernels* base = avx512_kernels()) made = *base;
    made.isa = "avx512bf16";
    made.attention = attention;
    made.attention_backward = attention_backward;
    made.activation = activation;
    made.activation_backward = activation_backward;
    made.linear = linear;
    made.linear_backward_input = linear_backward_input;
    made.linear_backward_weight = linear_backward_weight;
    return made;
  }();
  static const bool available = avx512_kernels() != nullptr && __builtin_cpu_supports("avx512bf16");
  return available ? &table : nullptr;
}

}  // namespace fastgpt::cpu
#else
namespace fastgpt::cpu {
const Kernels* avx512bf16_kernels() { return nullptr; }
}  // namespace fastgpt::cpu
#endif
