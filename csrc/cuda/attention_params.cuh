// What a call of the attention kernels is given: plain data, for the bindings, the launchers and the kernels.
#pragma once

#include <cstdint>

namespace fastgpt::attention {

constexpr float kLog2E = 1.4426950408889634f;

struct Strides {
  int64_t batch, head, row;  // in elements; the head's dimension is contiguous
};

// Tensors are (B, H, T, D) by their strides, D contiguous, rows 16-byte aligned; lse and delta are contiguous
// (B, H, Tq). Causal masks are aligned bottom-right: query i sees keys j <= i + keys - queries.
struct Params {
  const void *query, *key, *value;
  void* out;   // written by the forward, read by the backward
  float* lse;  // -inf where a query sees no key
  Strides query_stride, key_stride, value_stride, out_stride;
  int batch, heads, kv_heads, queries, keys, dim;
  float scale;  // positive
  bool causal;
  // Of attention_sm90 alone: keys before and behind a query's own position that it sees, negative for all; causal masks
  // limit the right to 0.
  int window_left = -1, window_right = -1;
  // Packed sequences, where first_queries is not null: `sequences` + 1 numbers each, that rise from 0 to queries and to
  // keys; sequence s has the rows from number s to the next. batch is 1, masks are aligned in each sequence. `plan` is
  // scratch for the order of the tiles of queries and of keys: 4 + 2 (queries / 128 + keys / 128 + 2 sequences)
  // numbers.
  const int *first_queries = nullptr, *first_keys = nullptr;
  int sequences = 0;
  int* plan = nullptr;
  // Dropout of the weights where `seed` is not null: those whose word is below the threshold go, the others are
  // multiplied (attention_dropout.cuh).
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  float keep_factor = 1.0f;

  // Of the backward alone. `delta` is scratch, (B, H, Tq): the row sums of dO O.
  const void* grad;
  void *grad_query, *grad_key, *grad_value;
  float* delta;
  // Where it is not null, the kernel with five products adds dQ here in fp32, by bulk reductions whose order is free:
  // zeros, grad_sums_numbers() of attention_sm90_grad_query.cuh. Of attention_sm90 alone.
  float* grad_query_sums = nullptr;
  Strides grad_stride, grad_query_stride, grad_key_stride, grad_value_stride;
};

// The keys in `splits` parts of `keys_per_split` (the last may be shorter). Scratch where there is more than one part:
// `part` (splits, B, H, Tq, D) and `part_lse` (splits, B, H, Tq).
struct DecodeParams {
  Params attention;
  float *part, *part_lse;
  int splits, keys_per_split;
};

}  // namespace fastgpt::attention
