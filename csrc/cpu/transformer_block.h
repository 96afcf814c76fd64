// A whole pre-norm transformer block, forward and backward, in one call each, made of the kernels of the table:
//
//   x' = x  + attention(layer_norm_1(x) Wqkv^T + bqkv) Wproj^T + bproj
//   y  = x' + f(layer_norm_2(x') Wfc^T + bfc) Wout^T + bout
//
// In training attention's weights and what each half adds to the residual stream may be dropped out; the backward makes
// the masks again.
//
// What one call saves over thirteen: the way through Python and the dispatcher, which for a small model costs more than
// the arithmetic, and the passes over memory between the parts (residuals, activations and conversions ride on the
// products). The norms' results are computed again in the backward rather than kept.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace fastgpt::cpu {

struct LinearWeights {
  const void* weight;  // (out, in), or (in, out) where `transposed`
  const void* bias;    // (out), or nullptr
};

struct LinearGradients {
  void* weight;  // as the weight, or nullptr
  void* bias;    // (out), or nullptr
};

// Of attention's weights, and of what the projection and the second layer of the MLP add to the stream (rows, width).
struct BlockDropout {
  AttentionDropout attention, proj, out;
};

struct BlockShape {
  DType stream;     // of x, y and their gradients
  DType params;     // of all parameters and their gradients
  DType inner;      // of what lies between the products
  bool half;        // products of bf16 pairs allowed
  bool transposed;  // the products' weights are (in, out) in memory
  Activation activation;
  float eps;
  int64_t batch, time, width, heads, kv_heads, hidden;
  BlockDropout dropout;
};

// What the forward keeps for the backward: rows = batch * time.
struct BlockState {
  float* mean1;    // (rows)
  float* rstd1;    // (rows)
  void* qkv;       // (rows, (heads + 2 kv_heads) D), inner
  float* lse;      // (batch, heads, time)
  void* attended;  // (rows, width), inner
  void* middle;    // (rows, width), stream: x'
  float* mean2;    // (rows)
  float* rstd2;    // (rows)
  void* hidden;    // (rows, hidden), inner: the activation's result; nullptr where no backward follows
  void* slope;     // (rows, hidden), inner: the activation's derivative; nullptr likewise
};

struct BlockWeights {
  LinearWeights norm1, qkv, proj, norm2, fc, out;
};

struct BlockGradients {
  LinearGradients norm1, qkv, proj, norm2, fc, out;
};

void transformer_block(const BlockShape& shape, const BlockWeights& weights, const void* x, const BlockState& state,
                       void* y, int threads);

void transformer_block_backward(const BlockShape& shape, const BlockWeights& weights, const void* x,
                                const BlockState& state, const void* dy, void* dx, const BlockGradients& gradients,
                                int threads);

}  // namespace fastgpt::cpu
