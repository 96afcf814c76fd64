// The order of a transformer block's kernels, forward and backward; the arithmetic is in the table.
#include "cpu/transformer_block.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastgpt::cpu {
namespace {

int64_t size_of(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 4; }

#include "cpu/memory.inl"

struct Block {
  const BlockShape& s;
  const BlockWeights& w;
  int threads;
  const Kernels& run = kernels();
  int64_t rows = s.batch * s.time;
  int64_t dim = s.width / s.heads;
  int64_t qkv_width = (s.heads + 2 * s.kv_heads) * dim;
  float scale = 1.0f / std::sqrt(static_cast<float>(dim));

  void norm(const LinearWeights& p, const void* x, void* y, float* mean, float* rstd) const {
    run.layer_norm({.dtype = s.stream,
                    .x_dtype = s.stream,
                    .param_dtype = s.params,
                    .x = x,
                    .weight = p.weight,
                    .bias = p.bias,
                    .y = y,
                    .mean = mean,
                    .rstd = rstd,
                    .rows = rows,
                    .cols = s.width,
                    .eps = s.eps},
                   threads);
  }

  // dx = the norm's gradient + dsum.
  void norm_backward(const LinearWeights& p, const LinearGradients& g, const void* dy, const void* dsum, const void* x,
                     const float* mean, const float* rstd, void* dx) const {
    run.layer_norm_backward({.dtype = s.stream,
                             .param_dtype = s.params,
                             .dy = dy,
                             .dsum = dsum,
                             .x = x,
                             .weight = p.weight,
                             .mean = mean,
                             .rstd = rstd,
                             .dx = dx,
                             .dweight = g.weight,
                             .dbias = g.bias,
                             .rows = rows,
                             .cols = s.width},
                            threads);
  }

  LinearArgs product(const LinearWeights& p, DType x_dtype, const void* x, int64_t in, DType y_dtype, void* y,
                     int64_t out) const {
    return {.half = s.half,
            .transposed = s.transposed,
            .x_dtype = x_dtype,
            .w_dtype = s.params,
            .y_dtype = y_dtype,
            .residual_dtype = s.stream,
            .x = x,
            .weight = p.weight,
            .bias = p.bias,
            .y = y,
            .rows = rows,
            .in = in,
            .out = out};
  }

  LinearBackwardInputArgs input_gradient(const LinearWeights& p, DType dy_dtype, const void* dy, int64_t out,
                                         DType dx_dtype, void* dx, int64_t in) const {
    return {.half = s.half,
            .transposed = s.transposed,
            .dy_dtype = dy_dtype,
            .w_dtype = s.params,
            .dx_dtype = dx_dtype,
            .slope_dtype = s.inner,
            .dy = dy,
            .weight = p.weight,
            .dx = dx,
            .rows = rows,
            .in = in,
            .out = out};
  }

  void weight_gradient(const LinearGradients& g, DType dy_dtype, const void* dy, int64_t out, DType x_dtype,
                       const void* x, int64_t in) const {
    if (g.weight == nullptr && g.bias == nullptr) return;
    run.linear_backward_weight({.half = s.half,
                                .transposed = s.transposed,
                                .accumulate = false,
                                .dy_dtype = dy_dtype,
                                .x_dtype = x_dtype,
                                .dw_dtype = s.params,
                                .db_dtype = s.params,
                                .dy = dy,
                                .x = x,
                                .dweight = g.weight,
                                .dbias = g.bias,
                                .rows = rows,
                                .in = in,
                                .out = out},
                               threads);
  }

  // y = x * mask / (1 - p) + residual; y may be x.
  void drop(const AttentionDropout& d, const void* x, const void* residual, void* y) const {
    run.dropout({.x_dtype = s.stream,
                 .dtype = s.stream,
                 .x = x,
                 .residual = residual,
                 .y = y,
                 .n = rows * s.width,
                 .seed = d.seed,
                 .threshold = d.threshold,
                 .scale = d.scale},
                threads);
  }

  // What a half of the block adds to the stream, as a product and its residual, or with dropout between the two.
  void add(LinearArgs product, const AttentionDropout& d, const void* residual) const {
    if (d.threshold == 0) product.residual = residual;
    run.linear(product, threads);
    if (d.threshold != 0) drop(d, product.y, residual, product.y);
  }

  // The gradient of what a half added: dy itself, or in `masked` what dropout left of it.
  const void* added_gradient(const AttentionDropout& d, const void* dy, void* masked) const {
    if (d.threshold == 0) return dy;
    drop(d, dy, nullptr, masked);
    return masked;
  }

  // Heads of one part of the queries, keys and values, which lie side by side in a row of `qkv`.
  AttentionTensor heads(void* qkv, int64_t first) const {
    return {static_cast<char*>(qkv) + first * dim * size_of(s.inner), s.time * qkv_width, dim, qkv_width};
  }
  AttentionTensor merged(void* data) const { return {data, s.time * s.width, dim, s.width}; }
};

}  // namespace

void transformer_block(const BlockShape& s, const BlockWeights& w, const void* x, const BlockState& state, void* y,
                       int threads) {
  const Block block{s, w, threads};
  const int64_t rows = block.rows;
  void* normed = thread_memory<0>(rows * s.width * size_of(s.stream));

  block.norm(w.norm1, x, normed, state.mean1, state.rstd1);
  block.run.linear(block.product(w.qkv, s.stream, normed, s.width, s.inner, state.qkv, block.qkv_width), threads);
  block.run.attention({.dtype = s.inner,
                       .q = block.heads(state.qkv, 0),
                       .k = block.heads(state.qkv, s.heads),
                       .v = block.heads(state.qkv, s.heads + s.kv_heads),
                       .o = block.merged(state.attended),
                       .lse = state.lse,
                       .batch = s.batch,
                       .heads = s.heads,
                       .kv_heads = s.kv_heads,
                       .queries = s.time,
                       .keys = s.time,
                       .dim = block.dim,
                       .scale = block.scale,
                       .causal = true,
                       .dropout = s.dropout.attention},
                      threads);
  block.add(block.product(w.proj, s.inner, state.attended, s.width, s.stream, state.middle, s.width), s.dropout.proj,
            x);

  block.norm(w.norm2, state.middle, normed, state.mean2, state.rstd2);
  void* activated = state.hidden != nullptr ? state.hidden : thread_memory<1>(rows * s.hidden * size_of(s.inner));
  LinearArgs fc = block.product(w.fc, s.stream, normed, s.width, s.inner, activated, s.hidden);
  fc.has_activation = true;
  fc.activation = s.activation;
  fc.slope = state.slope;
  block.run.linear(fc, threads);
  block.add(block.product(w.out, s.inner, activated, s.hidden, s.stream, y, s.width), s.dropout.out, state.middle);
}

void transformer_block_backward(const BlockShape& s, const BlockWeights& w, const void* x, const BlockState& state,
                                const void* dy, void* dx, const BlockGradients& g, int threads) {
  const Block block{s, w, threads};
  const int64_t rows = block.rows;
  void* normed = thread_memory<0>(rows * s.width * size_of(s.stream));
  // The gradient of the activation's input, then over it that of queries, keys and values.
  void* inner = thread_memory<1>(rows * std::max(s.hidden, block.qkv_width) * size_of(s.inner));
  void* dmiddle = thread_memory<2>(rows * s.width * size_of(s.stream));
  void* dattended = thread_memory<3>(rows * s.width * size_of(s.inner));
  const bool masks = s.dropout.proj.threshold != 0 || s.dropout.out.threshold != 0;
  void* masked = thread_memory<4>(masks ? rows * s.width * size_of(s.stream) : 0);

  const void* dout = block.added_gradient(s.dropout.out, dy, masked);
  block.weight_gradient(g.out, s.stream, dout, s.width, s.inner, state.hidden, s.hidden);
  LinearBackwardInputArgs hidden = block.input_gradient(w.out, s.stream, dout, s.width, s.inner, inner, s.hidden);
  hidden.slope = state.slope;
  block.run.linear_backward_input(hidden, threads);

  block.norm(w.norm2, state.middle, normed, state.mean2, state.rstd2);
  block.weight_gradient(g.fc, s.inner, inner, s.hidden, s.stream, normed, s.width);
  block.run.linear_backward_input(block.input_gradient(w.fc, s.inner, inner, s.hidden, s.stream, normed, s.width),
                                  threads);
  block.norm_backward(w.norm2, g.norm2, normed, dy, state.middle, state.mean2, state.rstd2, dmiddle);

  const void* dproj = block.added_gradient(s.dropout.proj, dmiddle, masked);
  block.weight_gradient(g.proj, s.stream, dproj, s.width, s.inner, state.attended, s.width);
  block.run.linear_backward_input(block.input_gradient(w.proj, s.stream, dproj, s.width, s.inner, dattended, s.width),
                                  threads);
  block.run.attention_backward({.dtype = s.inner,
                                .q = block.heads(state.qkv, 0),
                                .k = block.heads(state.qkv, s.heads),
                                .v = block.heads(state.qkv, s.heads + s.kv_heads),
                                .o = block.merged(state.attended),
                                .do_ = block.merged(dattended),
                                .dq = block.heads(inner, 0),
                                .dk = block.heads(inner, s.heads),
                                .dv = block.heads(inner, s.heads + s.kv_heads),
                                .lse = state.lse,
                                .batch = s.batch,
                                .heads = s.heads,
                                .kv_heads = s.kv_heads,
                                .queries = s.time,
                                .keys = s.time,
                                .dim = block.dim,
                                .scale = block.scale,
                                .causal = true,
                                .dropout = s.dropout.attention},
                               threads);
  block.norm(w.norm1, x, normed, state.mean1, state.rstd1);
  block.weight_gradient(g.qkv, s.inner, inner, block.qkv_width, s.stream, normed, s.width);
  block.run.linear_backward_input(
      block.input_gradient(w.qkv, s.inner, inner, block.qkv_width, s.stream, normed, s.width), threads);
  block.norm_backward(w.norm1, g.norm1, normed, dmiddle, x, state.mean1, state.rstd1, dx);
}

}  // namespace fastgpt::cpu
