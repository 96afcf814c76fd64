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
