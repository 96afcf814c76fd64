// y = x * mask / (1 - p), plus a residual; the mask is made from the seed (philox.inl) and never stored. The backward
// is the same function of the gradient.

constexpr int kChains = FASTGPT_LANES == 16 ? 4 : 2;     // as many as the registers hold
constexpr int64_t kDropoutBlock = 2 * kChains * kLanes;  // elements made at once: threads begin at multiples of them

template <class X, class T, bool kResidual>
INLINE void dropout_range(const DropoutArgs& a, int64_t begin, int64_t end) {
  const X* x = static_cast<const X*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const auto part = [&](int64_t i, VecUInt words, int n) {
    const Vec factor = words >= a.threshold ? splat(a.scale) : Vec{};
    Vec v = load_part(x + i, n) * factor;
    if constexpr (kResidual) v = v + load_part(residual + i, n);
    store_part(y + i, v, n);
  };
  for (int64_t i = begin; i < end; i += kDropoutBlock) {
    VecUInt words[2 * kChains];
    philox_elements<kChains>(static_cast<uint64_t>(i) / 4, a.seed, words);
    if (i + kDropoutBlock <= end) {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * kChains; ++v) part(i + v * kLanes, words[v], kLanes);
      continue;
    }
    for (int v = 0; v < 2 * kChains && i + v * kLanes < end; ++v)
      part(i + v * kLanes, words[v], static_cast<int>(std::min<int64_t>(end - i - v * kLanes, kLanes)));
  }
}

void dropout(const DropoutArgs& a, int threads) {
  with_type(a.x_dtype, [&](auto x_tag) {
    with_type(a.dtype, [&](auto tag) {
      using X = decltype(x_tag);
      using T = decltype(tag);
      const int64_t blocks = (a.n + kDropoutBlock - 1) / kDropoutBlock;
      parallel_for(blocks, kGrain / kDropoutBlock, threads, [&](int64_t first, int64_t last) {
        const int64_t begin = first * kDropoutBlock, end = std::min(a.n, last * kDropoutBlock);
        if (a.residual != nullptr) {
          dropout_range<X, T, true>(a, begin, end);
        } else {
          dropout_range<X, T, false>(a, begin, end);
        }
      });
    });
  });
}
