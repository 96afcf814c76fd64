// Row softmax with a scale, an additive mask and a causal limit, and its backward.
//
//   v_j = scale * x_j + mask_j,  m = max v,  y_j = exp(v_j - m) / sum exp(v - m)
//   dx = scale * y * (dy - sum(dy * y))
//
// A row is read from memory once; the two further passes find it in L1 or L2 (a row of 50,257 floats is 200 KB). A row
// that sees no key, or holds a NaN or +inf, is NaN where exp(v - m) is, as in torch.

// Rows up to this long are prefetched while the one before is computed; longer ones would push it out of L1. Where
// results go past the caches, the row after it, into L2: a tenth faster.
constexpr int64_t kPrefetchedRow = 4096;

constexpr float kFused = 1e6f;  // beyond it the rounding of m * factor would no longer be a factor near 1 of all terms

// row_j = exp2(factor (v_j - m)), and their sum; `fused` rounds once: what m * factor loses is the same for all j.
template <int kLevel, class T, bool kIsFused, class V>
INLINE Vec softmax_exps(const V* v, float* row, int64_t seen, float m, float factor, const T* next) {
  const Vec top = splat(m), offset = splat(-m * factor), by = splat(factor);
  const auto term = [&](Vec x) __attribute__((always_inline)) {
    return exp2<sizeof(T) == 2>(kIsFused ? fma(x, by, offset) : (x - top) * by);
  };
  Vec total = {};
  int64_t j = 0;
  for (; j + kLanes <= seen; j += kLanes) {
    if (next != nullptr) __builtin_prefetch(next + j, 0, kLevel);  // memory works while exp2 computes
    const Vec e = term(load(v + j));
    store(row + j, e);
    total = total + e;
  }
  if (const int rest = static_cast<int>(seen - j); rest > 0) {
    store_n(row + j, term(load_n(v + j, rest)), rest);
    total = total + load_n(row + j, rest);
  }
  return total;
}

template <int kLevel, class T, class V>
INLINE Vec softmax_exps(const V* v, float* row, int64_t seen, float m, float factor, const T* next) {
  return std::fabs(m * factor) < kFused ? softmax_exps<kLevel, T, true>(v, row, seen, m, factor, next)
                                        : softmax_exps<kLevel, T, false>(v, row, seen, m, factor, next);
}

// With `past`, which y must allow, y is written past the caches and `row` is memory of its own.
template <class T, class Past>
INLINE void softmax_row(const T* x, const float* mask, T* y, float* row, int64_t seen, int64_t cols, float scale,
                        const T* next, Past past) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const bool plain = mask == nullptr && scale > 0.0f;  // then the largest x is the largest v
  Vec most = splat(kNone);
  int64_t j = 0;
  int rest;
  if (plain) {
    Vec others[3] = {most, most, most};
    for (; j + 4 * kLanes <= seen; j += 4 * kLanes) {
      most = max(most, load(x + j));
      for (int k = 0; k < 3; ++k) others[k] = max(others[k], load(x + j + (k + 1) * kLanes));
    }
    most = max(max(most, others[0]), max(others[1], others[2]));
    for (; j + kLanes <= seen; j += kLanes) most = max(most, load(x + j));
    rest = static_cast<int>(seen - j);
    if (rest > 0) most = max(most, load_n(x + j, rest, kNone));
  } else {
    for (; j + kLanes <= seen; j += kLanes) {
      Vec v = load(x + j) * scale;
      if (mask != nullptr) v = v + load(mask + j);
      store(row + j, v);
      most = max(most, v);
    }
    rest = static_cast<int>(seen - j);
    if (rest > 0) {
      Vec v = load_n(x + j, rest) * scale;
      if (mask != nullptr) v = v + load_n(mask + j, rest);
      store_n(row + j, v, rest);
      most = max(most, load_n(row + j, rest, kNone));
    }
  }
  const Vec total = plain ? softmax_exps<past.value ? 2 : 3, T>(x, row, seen, max(most), scale * kLog2E, next)
                          : softmax_exps<past.value ? 2 : 3, T>(row, row, seen, max(most), kLog2E, next);
  const float inverse = seen > 0 ? 1.0f / sum(total) : std::numeric_limits<float>::quiet_NaN();

  for (j = 0; j + kLanes <= seen; j += kLanes) {
    const Vec v = load(row + j) * inverse;
    past.value ? store_past(y + j, v) : store(y + j, v);
  }
  if (rest > 0) store_n(y + j, load_n(row + j, rest) * inverse, rest);
  const T beyond = from_float<T>(inverse == inverse ? 0.0f : inverse);  // masked keys: exp(-inf - m) * inverse
  std::fill(y + seen, y + cols, beyond);
}

// Calls run(past), a constant: whether rows of the result y are written past the caches, if `worth_it`.
template <class T, class Run>
INLINE void with_rows_past(bool worth_it, const void* y, int64_t rows, int64_t cols, const Run& run) {
  const bool past = worth_it && rows * cols * static_cast<int64_t>(sizeof(T)) >= kPastCaches && cols % kLanes == 0 &&
                    cols <= kPrefetchedRow && is_aligned(static_cast<const T*>(y));
  past ? run(std::true_type{}) : run(std::false_type{});
}

INLINE int64_t softmax_grain(int64_t cols) { return std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, cols)); }

void softmax(const SoftmaxArgs& a, int threads) {
  const int64_t rows = a.batch * a.heads * a.queries;
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_rows_past<T>(sizeof(T) == sizeof(float), a.y, rows, a.cols, [&](auto past) {
      constexpr bool kInPlace = sizeof(T) == sizeof(float) && !past.value;
      parallel_for(rows, softmax_grain(a.cols), threads, [&](int64_t begin, int64_t end) {
        float* buffer = kInPlace ? nullptr : scratch(a.cols);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t query = r % a.queries, head = r / a.queries % a.heads, batch = r / a.queries / a.heads;
          const int64_t limit = query + 1 + a.cols - a.queries;
          const int64_t seen = a.causal ? std::clamp<int64_t>(limit, 0, a.cols) : a.cols;
          const float* mask = a.mask;
          if (mask != nullptr) mask += batch * a.mask_stride[0] + head * a.mask_stride[1] + query * a.mask_stride[2];
          T* y = static_cast<T*>(a.y) + r * a.cols;
          float* row = buffer;
          if constexpr (kInPlace) row = y;
          const T* x = static_cast<const T*>(a.x) + r * a.cols;
          const int64_t ahead = r + (past.value ? 2 : 1);
          const T* next = ahead < end && a.cols <= kPrefetchedRow ? x + (ahead - r) * a.cols : nullptr;
          softmax_row(x, mask, y, row, seen, a.cols, a.scale, next, past);
        }
        if (past.value) fence();
      });
    });
  });
}

void softmax_backward(const SoftmaxBackwardArgs& a, int threads) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_rows_past<T>(true, a.dx, a.rows, a.cols, [&](auto past) {
      parallel_for(a.rows, softmax_grain(a.cols), threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const T* dy = static_cast<const T*>(a.dy) + r * a.cols;
          const T* y = static_cast<const T*>(a.y) + r * a.cols;
          T* dx = static_cast<T*>(a.dx) + r * a.cols;
          Vec products = {};
          int64_t j = 0;
          for (; j + kLanes <= a.cols; j += kLanes) products = fma(load(dy + j), load(y + j), products);
          const int rest = static_cast<int>(a.cols - j);
          if (rest > 0) products = fma(load_n(dy + j, rest), load_n(y + j, rest), products);
          const float dot = sum(products);
          for (j = 0; j + kLanes <= a.cols; j += kLanes) {
            const Vec v = a.scale * load(y + j) * (load(dy + j) - dot);
            past.value ? store_past(dx + j, v) : store(dx + j, v);
          }
          if (rest > 0) store_n(dx + j, a.scale * load_n(y + j, rest) * (load_n(dy + j, rest) - dot), rest);
        }
        if (past.value) fence();
      });
    });
  });
}
