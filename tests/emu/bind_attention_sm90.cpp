#include "bind_attention.h"
#include "cuda/attention_sm90_launch.cuh"

// After the common arguments: the number of multiprocessors, the grid's limit, then the options.
static Params forward(const emu::Arguments& a) {
  int next = 14;
  return with_options(a, params(a), next);
}
static Params backward(const emu::Arguments& a) {
  int next = 19;
  Params p = with_options(a, backward_params(a), next);
  if (a.count > next) p.grad_query_sums = a.pointer<float>(next);
  return p;
}
// The floats of grad_query_sums: a tensor of one int64, then batch, heads, queries, dim, sequences (0: not packed).
EMU_BIND(sums) {
  Params p = {};
  p.batch = a.integer(1), p.heads = a.integer(2), p.queries = a.integer(3), p.dim = a.integer(4);
  p.sequences = a.integer(5);
  const int none = 0;
  if (p.sequences > 0) p.first_queries = &none;
  *a.pointer<int64_t>(0) = grad_sums_numbers(p);
}

#if !defined(EMU_TSAN) && !defined(EMU_ASAN)
EMU_BIND(attention_fwd_fp16) { attention_fwd_sm90<__half>(forward(a), a.integer(13), nullptr); }
EMU_BIND(attention_fwd_bf16) { attention_fwd_sm90<__nv_bfloat16>(forward(a), a.integer(13), nullptr); }
#else
EMU_BIND(attention_fwd_bf16) {
  launch_attention_fwd_sm90<__nv_bfloat16, 64, false>(forward(a), a.integer(13), nullptr);
}
#endif

// plan (int32); first_queries, first_keys, sequences, queries, keys, causal, and whether its rows are keys.
EMU_BIND(plan) {
  Params p = {};
  int* plan = a.pointer<int>(0);
  p.first_queries = a.pointer<int>(1), p.first_keys = a.pointer<int>(2), p.sequences = a.integer(3), p.batch = 1;
  p.queries = a.integer(4), p.keys = a.integer(5), p.causal = a.integer(6), p.heads = p.kv_heads = 1;
  int count = 0;
  if (a.integer(7)) {
    schedule_sm90<128, 64, true>(p, plan, nullptr, count);
  } else {
    schedule_sm90<128, 64, false>(p, plan, nullptr, count);
  }
}

// ranges (4): of the keys that queries see, and of the queries that keys see; queries, keys, window_left, window_right,
// causal, the rows from .. to.
EMU_BIND(ranges) {
  Params p = {};
  p.window_left = a.integer(3), p.window_right = a.integer(4), p.causal = a.integer(5);
  const Sight sight = sight_of(p, a.integer(1), a.integer(2));
  const Range rows = {int(a.integer(6)), int(a.integer(7))}, keys = sight.keys_of(rows),
              queries = sight.queries_of(rows);
  int64_t* to = a.pointer<int64_t>(0);
  to[0] = keys.begin, to[1] = keys.end, to[2] = queries.begin, to[3] = queries.end;
}

// tiles (count, 3) of a schedule: blocks, heads, batch, bytes of a key head, group, rising.
EMU_BIND(schedule) {
  Schedule s = longest_first(a.integer(1), a.integer(2), a.integer(3), a.integer(4), a.integer(5));
  s.rising = a.integer(6);
  for (int i = 0; i < s.count(); ++i) {
    const Tile tile = s.tile(i);
    int64_t* row = a.pointer<int64_t>(0) + 3 * i;
    row[0] = tile.block, row[1] = tile.head, row[2] = tile.sequence;
  }
}

#if !defined(EMU_TSAN) && !defined(EMU_ASAN)
EMU_BIND(attention_bwd_fp16) { attention_bwd_sm90<__half>(backward(a), nullptr); }
EMU_BIND(attention_bwd_bf16) { attention_bwd_sm90<__nv_bfloat16>(backward(a), nullptr); }
#else
EMU_BIND(attention_bwd_bf16) { launch_attention_bwd_sm90<__nv_bfloat16, 64, false>(backward(a), nullptr); }
#endif

#if !defined(EMU_TSAN) && !defined(EMU_ASAN)
// As fastgpt/ops/cuda_attention.py calls the module.
EMU_BIND(attention) {
  with_half_type(static_cast<fastgpt::cuda::Type>(a.integer(1)),
                 [&](auto x) { attention_fwd_sm90<decltype(x)>(module_params(a, false), 2, nullptr); });
}
EMU_BIND(attention_backward) {
  with_half_type(static_cast<fastgpt::cuda::Type>(a.integer(1)),
                 [&](auto x) { attention_bwd_sm90<decltype(x)>(module_params(a, true), nullptr); });
}
#endif
