// The arguments of the bindings of attention.
#pragma once

#include "bind.h"
#include "cuda/attention_tiles.cuh"

using namespace fastgpt::attention;

// query, key, value, out, lse; batch, heads, kv_heads, queries, keys, dim, causal, scale. Heads lie between rows:
// (B, T, H, D) in memory.
inline Params params(const emu::Arguments& a) {
  Params p = {};
  p.query = a.pointer<void>(0), p.key = a.pointer<void>(1), p.value = a.pointer<void>(2);
  p.out = a.pointer<void>(3), p.lse = a.pointer<float>(4);
  p.batch = a.integer(5), p.heads = a.integer(6), p.kv_heads = a.integer(7), p.queries = a.integer(8);
  p.keys = a.integer(9), p.dim = a.integer(10), p.causal = a.integer(11), p.scale = a.number(12);
  const int64_t row = int64_t(p.heads) * p.dim, kv_row = int64_t(p.kv_heads) * p.dim;
  p.query_stride = p.out_stride = p.grad_stride = p.grad_query_stride = {row * p.queries, p.dim, row};
  p.key_stride = p.value_stride = p.grad_key_stride = p.grad_value_stride = {kv_row * p.keys, p.dim, kv_row};
  return p;
}

// then: grad, grad_query, grad_key, grad_value, delta
inline Params backward_params(const emu::Arguments& a) {
  Params p = params(a);
  p.grad = a.pointer<void>(13), p.grad_query = a.pointer<void>(14), p.grad_key = a.pointer<void>(15);
  p.grad_value = a.pointer<void>(16), p.delta = a.pointer<float>(17);
  return p;
}

// What attention_sm90 alone takes, from argument `next` on: window_left, window_right, first_queries and first_keys
// (int32; or null), sequences, plan, seed (or null), threshold, keep_factor.
inline Params with_options(const emu::Arguments& a, Params p, int& next) {
  p.window_left = a.integer(next++), p.window_right = a.integer(next++);
  p.first_queries = a.pointer<int>(next++), p.first_keys = a.pointer<int>(next++);
  p.sequences = a.integer(next++), p.plan = a.pointer<int>(next++);
  p.seed = a.pointer<int64_t>(next++), p.threshold = a.integer(next++), p.keep_factor = a.number(next++);
  return p;
}

// The arguments of the module's functions `attention` and `attention_backward` (csrc/python/cuda_attention.cpp), flat,
// from the `next`th on, which moves past them; those of attention_decode have no options.
inline Params module_params(const emu::Arguments& a, bool backward, int& next, bool with_module_options = false) {
  const auto strides = [&] {
    next += 3;
    return Strides{a.integer(next - 3), a.integer(next - 2), a.integer(next - 1)};
  };
  const auto pointer = [&] { return a.pointer<void>(next++); };
  Params p = {};
  p.query = pointer(), p.query_stride = strides(), p.key = pointer(), p.key_stride = strides();
  p.value = pointer(), p.value_stride = strides(), p.out = pointer(), p.out_stride = strides();
  p.lse = static_cast<float*>(pointer());
  for (int* size : {&p.batch, &p.heads, &p.kv_heads, &p.queries, &p.keys, &p.dim}) *size = a.integer(next++);
  p.scale = a.number(next++), p.causal = a.integer(next++);
  if (with_module_options) p = with_options(a, p, next);
  if (!backward) return p;
  p.grad = pointer(), p.grad_stride = strides(), p.grad_query = pointer(), p.grad_query_stride = strides();
  p.grad_key = pointer(), p.grad_key_stride = strides(), p.grad_value = pointer(), p.grad_value_stride = strides();
  p.delta = static_cast<float*>(pointer()), p.grad_query_sums = static_cast<float*>(pointer());
  return p;
}

inline Params module_params(const emu::Arguments& a, bool backward) {
  int next = 2;  // after the chip and the type
  return module_params(a, backward, next, true);
}
