// One instruction set's whole engine: every kernel compiled for it in an anonymous namespace, and the table of them.
// Included once by portable.cpp, avx2.cpp and avx512.cpp, which set FASTGPT_LANES, FASTGPT_ISA and the target first.

namespace fastgpt::cpu {
namespace {

// clang-format off: the order matters
#include "cpu/vec.inl"
#include "cpu/vec_math.inl"
#include "cpu/memory.inl"
#include "cpu/parallel.inl"

#include "cpu/activation.inl"
#include "cpu/bias_activation.inl"
#include "cpu/swiglu.inl"
#include "cpu/adamw.inl"
#include "cpu/philox.inl"

#include "cpu/attention.inl"
#include "cpu/cross_entropy.inl"
#include "cpu/dropout.inl"
#include "cpu/embedding.inl"
#include "cpu/log_softmax.inl"
#include "cpu/layer_norm.inl"
#include "cpu/rope.inl"
#include "cpu/product.inl"
#include "cpu/linear_few_rows.inl"
#include "cpu/linear.inl"
#include "cpu/softmax.inl"
// clang-format on

const Kernels kTable = {
    .isa = FASTGPT_ISA,
    .lanes = kLanes,
    .activation = activation,
    .activation_backward = activation_backward,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .bias_activation = bias_activation,
    .bias_activation_backward = bias_activation_backward,
    .softmax = softmax,
    .softmax_backward = softmax_backward,
    .layer_norm = layer_norm,
    .layer_norm_backward = layer_norm_backward,
    .cross_entropy = cross_entropy,
    .cross_entropy_backward = cross_entropy_backward,
    .log_softmax = log_softmax,
    .log_softmax_backward = log_softmax_backward,
    .dropout = dropout,
    .embedding = embedding,
    .embedding_backward = embedding_backward,
    .attention = attention,
    .attention_backward = attention_backward,
    .rope = rope,
    .linear = linear,
    .linear_backward_input = linear_backward_input,
    .linear_backward_weight = linear_backward_weight,
    .grad_norm = grad_norm,
    .adamw = adamw,
};

}  // namespace
}  // namespace fastgpt::cpu
