// Cross-entropy of logits (rows, classes) with integer targets, fused with the log-softmax, and its gradient: in the
// same pass or in one of its own.
//
//   lse = log sum exp(x),  loss = lse - (1 - s) x_t - s mean(x) + z lse^2
//   dx_j = g ((1 + 2 z lse) exp(x_j - lse) - (1 - s) [j = t] - s / classes)
//
// with label smoothing s (arXiv 1512.00567, section 7) and the z-loss z (arXiv 2204.02311, section 5). Rows whose
// target is ignore_index have loss 0 and gradient 0. Targets are checked by the caller.

// Calls body(j, n) for each part of a row: four vectors at a time (n is 0 then), the rest one by one.
template <class Four, class One>
INLINE void for_parts(int64_t cols, const Four& four, const One& one) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= cols; j += 4 * kLanes) four(j);
  for (; j < cols; j += kLanes) one(j, static_cast<int>(std::min<int64_t>(kLanes, cols - j)));
}

struct RowMaximum {
  float maximum, mean;
};

// The row comes from memory here; what follows finds it in L2 (a row of 50,257 floats is 200 KB). Four chains: one
// would wait for itself.
template <class T>
INLINE RowMaximum row_maximum(const T* x, int64_t cols, bool wants_mean) {
  const float minus_inf = -std::numeric_limits<float>::infinity();
  Vec most[4] = {splat(minus_inf), splat(minus_inf), splat(minus_inf), splat(minus_inf)}, total[4] = {};
  for_parts(
      cols,
      [&](int64_t j) {
        for (int i = 0; i < 4; ++i) most[i] = max(most[i], load(x + j + i * kLanes));
      },
      [&](int64_t j, int n) { most[0] = max(most[0], n == kLanes ? load(x + j) : load_n(x + j, n, minus_inf)); });
  if (wants_mean) {
    for_parts(
        cols,
        [&](int64_t j) {
          for (int i = 0; i < 4; ++i) total[i] = total[i] + load(x + j + i * kLanes);
        },
        [&](int64_t j, int n) { total[0] = total[0] + load_part(x + j, n); });
  }
  return {max(max(max(most[0], most[1]), max(most[2], most[3]))),
          sum((total[0] + total[1]) + (total[2] + total[3])) / static_cast<float>(cols)};
}

// sum exp(x - maximum); the terms go to `kept` where it is not nullptr, which may be x. `next` is the following row (or
// any address): asking for it now lets memory work while exp does.
template <class T>
INLINE float sum_of_exp(const T* x, int64_t cols, float maximum, float* kept, const T* next) {
  const float minus_inf = -std::numeric_limits<float>::infinity();
  Vec parts[4] = {};
  for_parts(
      cols,
      [&](int64_t j) {
        constexpr int kAhead = 4 * kLanes * static_cast<int>(sizeof(T));
        for (int at = 0; at < kAhead; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(next + j) + at, 0, 2);
        for (int i = 0; i < 4; ++i) {
          const Vec e = exp(load(x + j + i * kLanes) - maximum);
          if (kept != nullptr) store(kept + j + i * kLanes, e);
          parts[i] = parts[i] + e;
        }
      },
      [&](int64_t j, int n) {
        const Vec e = exp((n == kLanes ? load(x + j) : load_n(x + j, n, minus_inf)) - maximum);
        if (kept != nullptr) store_part(kept + j, e, n);
        parts[0] = parts[0] + e;
      });
  return sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

template <class T>
INLINE void cross_entropy_row(const CrossEntropyArgs& a, int64_t r, float* buffer) {
  const T* x = static_cast<const T*>(a.logits) + r * a.classes;
  T* dx = a.dlogits == nullptr ? nullptr : static_cast<T*>(a.dlogits) + r * a.classes;
  const int64_t target = a.target[r];
  if (target == a.ignore_index) {
    a.losses[r] = 0.0f;
    a.lse[r] = 0.0;
    if (dx != nullptr) std::fill(dx, dx + a.classes, from_float<T>(0.0f));
    return;
  }
  const float s = a.label_smoothing, at_target = to_float(x[target]);  // dx may be the logits' own memory
  const RowMaximum row = row_maximum(x, a.classes, s > 0.0f);
  float* kept = nullptr;
  if constexpr (sizeof(T) == sizeof(float)) {
    kept = dx;
  } else if (dx != nullptr) {
    kept = buffer;
  }
  const float total = sum_of_exp(x, a.classes, row.maximum, kept, r + 1 < a.rows ? x + a.classes : x);
  a.lse[r] = static_cast<double>(row.maximum) + std::log(static_cast<double>(total));
  const float lse = static_cast<float>(a.lse[r]);
  a.losses[r] = (1.0f - s) * (lse - at_target) + (s > 0.0f ? s * (lse - row.mean) : 0.0f) +
                (a.z_loss != 0.0f ? a.z_loss * lse * lse : 0.0f);
  if (dx == nullptr) return;
  const float g = a.grad_scale, factor = g * (1.0f + 2.0f * a.z_loss * lse) / total;
  const float uniform = g * s / static_cast<float>(a.classes);
  const float probability = kept[target] * factor;
  for_parts(
      a.classes,
      [&](int64_t j) {
        for (int i = 0; i < 4; ++i) store(dx + j + i * kLanes, load(kept + j + i * kLanes) * factor - uniform);
      },
      [&](int64_t j, int n) { store_part(dx + j, load_part(kept + j, n) * factor - uniform, n); });
  dx[target] = from_float<T>(probability - uniform - g * (1.0f - s));
}

void cross_entropy(const CrossEntropyArgs& a, int threads) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(a.rows, std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, a.classes)), threads,
                 [&](int64_t begin, int64_t end) {
                   const bool buffered = sizeof(T) != sizeof(float) && a.dlogits != nullptr;
                   float* buffer = buffered ? scratch(a.classes) : nullptr;
                   for (int64_t r = begin; r < end; ++r) cross_entropy_row<T>(a, r, buffer);
                 });
  });
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& a, int threads) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(
        a.rows, std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, a.classes)), threads,
        [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            const T* x = static_cast<const T*>(a.logits) + r * a.classes;
            T* dx = static_cast<T*>(a.dlogits) + r * a.classes;
            const int64_t target = a.target[r];
            if (target == a.ignore_index) {
              std::fill(dx, dx + a.classes, from_float<T>(0.0f));
              continue;
            }
            const float g = a.grad[r * a.grad_stride] * a.grad_scale, lse = static_cast<float>(a.lse[r]);
            const float uniform = g * a.label_smoothing / static_cast<float>(a.classes);
            const float rest = static_cast<float>(a.lse[r] - lse);  // what float leaves out; NaN where lse is infinite
            const float factor = g * (1.0f + 2.0f * a.z_loss * lse) * (std::isfinite(lse) ? 1.0f - rest : 1.0f);
            const float at_target = to_float(x[target]);  // dx may be the logits' own memory
            for_parts(
                a.classes,
                [&](int64_t j) {
                  for (int i = 0; i < 4; ++i)
                    store(dx + j + i * kLanes, factor * exp(load(x + j + i * kLanes) - lse) - uniform);
                },
                [&](int64_t j, int n) { store_part(dx + j, factor * exp(load_part(x + j, n) - lse) - uniform, n); });
            const Vec probability = factor * exp(splat(at_target - lse));
            dx[target] = from_float<T>(probability[0] - uniform - g * (1.0f - a.label_smoothing));
          }
        });
  });
}
