// Cross-entropy of logits (rows, classes) with integer targets, fused with the log-softmax, and its backward.
//
//   lse = log sum exp(x),  loss = lse - (1 - s) x_t - s mean(x)   with label smoothing s (arXiv 1512.00567, section 7)
//   dx_j = g (exp(x_j - lse) - (1 - s) [j = t] - s / classes)
//
// Rows whose target is ignore_index have loss 0 and gradient 0. Targets are checked by the caller.

template <class T>
INLINE void cross_entropy_row(const T* x, int64_t classes, float* lse, float* mean) {
  const float minus_inf = -std::numeric_limits<float>::infinity();
  Vec most = splat(minus_inf), total = {};
  int64_t j = 0;
  for (; j + kLanes <= classes; j += kLanes) {
    Vec v = load(x + j);
    most = max(most, v);
    total = total + v;
  }
  const int rest = static_cast<int>(classes - j);
  if (rest > 0) {
    most = max(most, load_n(x + j, rest, minus_inf));
    total = total + load_n(x + j, rest);
  }
  const float m = max(most);
  Vec parts[4] = {};  // four sums: shorter chains for the adder, and less rounding over a vocabulary
  for (j = 0; j + 4 * kLanes <= classes; j += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) parts[i] = parts[i] + exp(load(x + j + i * kLanes) - m);
  }
  Vec exponentials = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  for (; j + kLanes <= classes; j += kLanes) exponentials = exponentials + exp(load(x + j) - m);
  float tail = 0.0f;
  if (rest > 0) {
    float lanes[kLanes];
    store(lanes, exp(load_n(x + j, rest, minus_inf) - m));
    for (int i = 0; i < rest; ++i) tail += lanes[i];
  }
  *lse = m + std::log(sum(exponentials) + tail);
  *mean = sum(total) / static_cast<float>(classes);
}

void cross_entropy(const CrossEntropyArgs& a, int threads) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(a.rows, std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, a.classes)), threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r) {
                     const T* x = static_cast<const T*>(a.logits) + r * a.classes;
                     const int64_t target = a.target[r];
                     if (target == a.ignore_index) {
                       a.losses[r] = 0.0f;
                       a.lse[r] = 0.0f;
                       continue;
                     }
                     float mean = 0.0f;
                     cross_entropy_row(x, a.classes, &a.lse[r], &mean);
                     const float s = a.label_smoothing;
                     a.losses[r] =
                         (1.0f - s) * (a.lse[r] - to_float(x[target])) + (s > 0.0f ? s * (a.lse[r] - mean) : 0.0f);
                   }
                 });
  });
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& a, int threads) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(a.rows, std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, a.classes)), threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r) {
                     const T* x = static_cast<const T*>(a.logits) + r * a.classes;
                     T* dx = static_cast<T*>(a.dlogits) + r * a.classes;
                     const int64_t target = a.target[r];
                     if (target == a.ignore_index) {
                       std::fill(dx, dx + a.classes, from_float<T>(0.0f));
                       continue;
                     }
                     const float g = a.grad[r * a.grad_stride] * a.grad_scale, lse = a.lse[r];
                     const float uniform = a.label_smoothing / static_cast<float>(a.classes);
                     const float at_target = to_float(x[target]);  // dx may be the logits' own memory
                     int64_t j = 0;
                     for (; j + kLanes <= a.classes; j += kLanes) store(dx + j, g * (exp(load(x + j) - lse) - uniform));
                     const int rest = static_cast<int>(a.classes - j);
                     if (rest > 0) store_n(dx + j, g * (exp(load_n(x + j, rest) - lse) - uniform), rest);
                     Vec probability = exp(splat(at_target - lse));
                     dx[target] = from_float<T>(g * (probability[0] - uniform - (1.0f - a.label_smoothing)));
                   }
                 });
  });
}
