// The launchers of attention_sm90.cuh and its backward, shared by the .cu files and the emulation's tests.
#pragma once

#include "cuda/attention_launch.cuh"
#include "cuda/attention_sm90.cuh"
#include "cuda/attention_sm90_backward.cuh"
#include "cuda/tensor_map.cuh"

namespace fastgpt::attention {

// The order of tiles of kBlock rows (kKeys: keys; else queries) that walk in steps of kStep; `count` is how many there
// are, or of packed sequences how many there may be, and then the list is made at `plan`.
template <int kBlock, int kStep, bool kKeys>
Schedule schedule_sm90(const Params& p, int* plan, cudaStream_t stream, int& count) {
  const int rows = kKeys ? p.keys : p.queries, heads = kKeys ? p.kv_heads : p.heads, group = p.heads / p.kv_heads;
  if (p.first_queries == nullptr) {
    const int64_t bytes = static_cast<int64_t>(kKeys ? p.queries * int64_t(group) : p.keys) * p.dim * 4;
    Schedule schedule = longest_first((rows + kBlock - 1) / kBlock, heads, p.batch, bytes, kKeys ? 1 : group);
    schedule.rising = kKeys;
    count = schedule.count();
    return schedule;
  }
  const int room = most_tiles(rows, p.sequences, kBlock);
  launch(attention_plan_kernel<kBlock, kStep, kKeys>, dim3(1), dim3(kPlanThreads), 0, stream, p, plan, room);
  count = room * heads;
  return {0, heads, p.sequences, 0, kKeys, plan};
}

template <class T, int kDim, bool kDropout>
void launch_attention_fwd_sm90(const Params& p, int multiprocessors, cudaStream_t stream) {
  using Shape = Sm90Forward<kDim>;
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  const auto map = [&](const char* name, const void* x, const Strides& s, int length, int heads, int rows) {
    return heads_tensor_map(name, x, kBFloat16, kDim, length, heads, p.batch, s.row, s.head, s.batch, rows);
  };
  int count = 0;
  const Schedule schedule = schedule_sm90<Shape::BLOCK_M, Shape::BLOCK_N, false>(p, p.plan, stream, count);
  launch_large(attention_fwd_sm90_kernel<T, kDim, kDropout>, dim3(count < multiprocessors ? count : multiprocessors),
               dim3(Shape::kThreads), Shape::kSharedBytes, stream,
               map("query", p.query, p.query_stride, p.queries, p.heads, Shape::BLOCK_M),
               map("key", p.key, p.key_stride, p.keys, p.kv_heads, Shape::BLOCK_N),
               map("value", p.value, p.value_stride, p.keys, p.kv_heads, Shape::BLOCK_N),
               map("out", p.out, p.out_stride, p.queries, p.heads, 16), p, schedule);
}

// Calls f with the head size and whether there is dropout, both as types.
template <class F>
void choose_sm90(const Params& p, const F& f) {
  const auto with_dim = [&](auto dim) {
    if (p.seed != nullptr) return f(dim, std::true_type{});
    f(dim, std::false_type{});
  };
  if (p.dim == 64) return with_dim(std::integral_constant<int, 64>{});
  if (p.dim == 128) return with_dim(std::integral_constant<int, 128>{});
  throw std::invalid_argument("head_dim: expected 64 or 128, got " + std::to_string(p.dim));
}

inline void check_sm90(const Params& p) {
  check_shape(p);
  if (p.queries > kUnlimited || p.keys > kUnlimited) {
    throw std::invalid_argument("attention: at most 2^30 - 1024 queries and keys, got " + std::to_string(p.queries) +
                                " and " + std::to_string(p.keys));
  }
  if (p.first_queries != nullptr && (p.batch != 1 || p.sequences < 1 || p.first_keys == nullptr || p.plan == nullptr)) {
    throw std::invalid_argument(
        "attention: packed sequences need a batch of 1, at least one sequence, the offsets of "
        "queries and keys, and a plan; got batch " +
        std::to_string(p.batch) + ", sequences " + std::to_string(p.sequences));
  }
}

// Raises std::invalid_argument for what the kernel does not cover, before anything is launched.
template <class T>
void attention_fwd_sm90(const Params& p, int multiprocessors, cudaStream_t stream) {
  check_sm90(p);
  check_rows("query", p.query, p.query_stride);
  check_rows("key", p.key, p.key_stride);
  check_rows("value", p.value, p.value_stride);
  check_rows("out", p.out, p.out_stride);
  choose_sm90(p, [&](auto dim, auto dropout) {
    launch_attention_fwd_sm90<T, dim.value, dropout.value>(p, multiprocessors, stream);
  });
}

template <class T, int kDim, bool kDropout>
void launch_attention_bwd_sm90(const Params& p, cudaStream_t stream) {
  using Form = BackwardForm;
  using Shape = Sm90Backward<kDim, Form::kKeys>;
  constexpr int kRows = Shape::BLOCK_ROWS, kColumns = Shape::BLOCK_COLUMNS;
  const auto map = [&](const char* name, const void* x, const Strides& s, int length, int heads, int rows) {
    constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
    return heads_tensor_map(name, x, kBFloat16, kDim, length, heads, p.batch, s.row, s.head, s.batch, rows);
  };
  const auto query = [&](int rows) { return map("query", p.query, p.query_stride, p.queries, p.heads, rows); };
  const auto grad = [&](int rows) { return map("grad", p.grad, p.grad_stride, p.queries, p.heads, rows); };
  const auto key = [&](int rows) { return map("key", p.key, p.key_stride, p.keys, p.kv_heads, rows); };
  const auto value = [&](int rows) { return map("value", p.value, p.value_stride, p.keys, p.kv_heads, rows); };
  launch(attention_delta_kernel<T, 90>, dim3((p.queries + 3) / 4, p.heads, p.batch), dim3(128), 0, stream, p);
  int count = 0;
  int* plan_of_keys = p.plan == nullptr ? nullptr : p.plan + plan_numbers(p.queries, p.sequences, kRows);
  const Schedule keys = schedule_sm90<kRows, kColumns, true>(p, plan_of_keys, stream, count);
  if (p.grad_query_sums != nullptr) {
    launch_large(attention_bwd_sm90_kernel<T, kDim, Form::kAll, kDropout>, dim3(count), dim3(Shape::kThreads),
                 Sm90Backward<kDim, Form::kAll>::kSharedBytes, stream, key(kRows), value(kRows), query(kColumns),
                 grad(kColumns), p, keys);
    return launch(attention_grad_query_sm90_kernel<T, kDim>, dim3(pieces(p), p.heads), dim3(256), 0, stream, p);
  }
  launch_large(attention_bwd_sm90_kernel<T, kDim, Form::kKeys, kDropout>, dim3(count), dim3(Shape::kThreads),
               Shape::kSharedBytes, stream, key(kRows), value(kRows), query(kColumns), grad(kColumns), p, keys);
  const Schedule queries = schedule_sm90<kRows, kColumns, false>(p, p.plan, stream, count);
  launch_large(attention_bwd_sm90_kernel<T, kDim, Form::kQueries, kDropout>, dim3(count), dim3(Shape::kThreads),
               Shape::kSharedBytes, stream, query(kRows), grad(kRows), key(kColumns), value(kColumns), p, queries);
}

// Raises std::invalid_argument for what the kernels do not cover, before anything is launched.
template <class T>
void attention_bwd_sm90(const Params& p, cudaStream_t stream) {
  check_sm90(p);
  check_backward(p);
  choose_sm90(p, [&](auto dim, auto dropout) { launch_attention_bwd_sm90<T, dim.value, dropout.value>(p, stream); });
}

}  // namespace fastgpt::attention
