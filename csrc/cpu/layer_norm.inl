// Layer normalisation (arXiv 1607.06450) and RMS normalisation (arXiv 1910.07467) over the last dimension, forward and
// backward, of x or of x + residual, which is then a second result.
//
//   LayerNorm  xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps),  y = xhat * weight + bias   (var without Bessel's
//              correction);  g = dy * weight;  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum
//   RMSNorm    xhat = x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps),  y = xhat * weight;
//              dx = rstd * (g - xhat * mean(g * xhat)) + dsum
//   dweight = sum_rows dy * xhat,  dbias = sum_rows dy,  dsum: the gradient of the second result
//
// The variance is that of the centred row, in a second pass over a row that is in L1 by then: no cancellation.

// Calls body(j, n, k) for the vectors of a row: n elements from j on, k one of four sums in turn, so that additions do
// not wait for each other.
template <class Body>
INLINE void for_vectors(int64_t cols, const Body& body) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= cols; j += 4 * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) body(j + k * kLanes, kLanes, k);
  }
  for (; j < cols; j += kLanes) body(j, static_cast<int>(std::min<int64_t>(kLanes, cols - j)), 0);
}

INLINE float sum(const Vec (&parts)[4]) { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }

// What a value is after it is stored and read again.
INLINE Vec rounded(Vec v, float) { return v; }
INLINE Vec rounded(Vec v, BFloat16) { return bit_cast<Vec>(widen(to_bfloat16(v)) << 16); }

// T: of y, of the residual and of the sum; X: of x; P: of the parameters.
template <bool kRms, class T, class X, class P>
INLINE void layer_norm_rows(const LayerNormArgs& a, int64_t begin, int64_t end) {
  const P* weight = static_cast<const P*>(a.weight);
  const P* bias = static_cast<const P*>(a.bias);
  const float inverse_cols = 1.0f / static_cast<float>(a.cols);
  for (int64_t r = begin; r < end; ++r) {
    const X* x = static_cast<const X*>(a.x) + r * a.cols;
    const T* row = reinterpret_cast<const T*>(x);  // what is normalised: x (of type T then), or the sum
    Vec totals[4] = {};
    const auto add = [&](Vec v, int k) { totals[k] = kRms ? fma(v, v, totals[k]) : totals[k] + v; };
    if (a.residual != nullptr) {
      const T* residual = static_cast<const T*>(a.residual) + r * a.cols;
      T* summed = static_cast<T*>(a.sum) + r * a.cols;
      for_vectors(a.cols, [&](int64_t j, int n, int k) {
        const Vec v = rounded(load_part(x + j, n) + load_part(residual + j, n), T{});
        store_part(summed + j, v, n);
        add(v, k);
      });
      row = summed;
    } else {
      for_vectors(a.cols, [&](int64_t j, int n, int k) { add(load_part(row + j, n), k); });
    }
    const float mean = kRms ? 0.0f : sum(totals) * inverse_cols;
    Vec squares[4] = {totals[0], totals[1], totals[2], totals[3]};
    if (!kRms) {
      for (Vec& part : squares) part = Vec{};
      for_vectors(a.cols, [&](int64_t j, int n, int k) {
        const Vec centred = (n >= kLanes ? load(row + j) : load_n(row + j, n, mean)) - mean;
        squares[k] = fma(centred, centred, squares[k]);
      });
      a.mean[r] = mean;
    }
    const float rstd = 1.0f / std::sqrt(sum(squares) * inverse_cols + a.eps);
    a.rstd[r] = rstd;
    T* y = static_cast<T*>(a.y) + r * a.cols;
    for_vectors(a.cols, [&](int64_t j, int n, int) {
      Vec v = load_part(row + j, n);
      v = (kRms ? v : v - mean) * rstd;
      if (weight != nullptr) v = v * load_part(weight + j, n);
      if (bias != nullptr) v = v + load_part(bias + j, n);
      store_part(y + j, v, n);
    });
  }
}

// Calls body(whether it is RMSNorm, pointer tag of the parameters).
template <class Body>
INLINE void with_norm(bool rms, DType param_dtype, const Body& body) {
  with_type(param_dtype, [&](auto tag) { rms ? body(std::true_type{}, tag) : body(std::false_type{}, tag); });
}

void layer_norm(const LayerNormArgs& a, int threads) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a.cols));
  with_norm(a.mean == nullptr, a.param_dtype, [&](auto rms, auto param_tag) {
    constexpr bool kRms = decltype(rms)::value;
    using P = decltype(param_tag);
    const auto run = [&](auto tag, auto x_tag) {
      parallel_for(a.rows, grain, threads, [&](int64_t begin, int64_t end) {
        layer_norm_rows<kRms, decltype(tag), decltype(x_tag), P>(a, begin, end);
      });
    };
    if (a.dtype == DType::kBFloat16) {
      run(BFloat16{}, BFloat16{});
    } else if (a.x_dtype == DType::kBFloat16) {
      run(float{}, BFloat16{});
    } else {
      run(float{}, float{});
    }
  });
}

// The sums over rows are kept a block of rows each and added in the blocks' order, so they do not depend on the number
// of threads.
constexpr int64_t kLayerNormBlocks = 16;

// Rows that share one load and store of the parameters' sums.
constexpr int kLayerNormGroup = 4;

template <bool kRms, int kRows, class T, class P>
INLINE void layer_norm_backward_group(const LayerNormBackwardArgs& a, int64_t r, float* dweight, float* dbias) {
  const P* weight = static_cast<const P*>(a.weight);
  const T *x[kRows], *dy[kRows];
  float mean[kRows], rstd[kRows];
  for (int i = 0; i < kRows; ++i) {
    x[i] = static_cast<const T*>(a.x) + (r + i) * a.cols;
    dy[i] = static_cast<const T*>(a.dy) + (r + i) * a.cols;
    mean[i] = kRms ? 0.0f : a.mean[r + i];
    rstd[i] = a.rstd[r + i];
  }
  const auto normalised = [&](int i, int64_t j, int n) {
    const Vec v = load_part(x[i] + j, n);
    return (kRms ? v : v - mean[i]) * rstd[i];
  };
  Vec sum_g[kRows] = {}, sum_gx[kRows] = {};
  const auto sums = [&](int64_t j, int n) {
    Vec dw = {}, db = {};
    if (dweight != nullptr) dw = load_part(dweight + j, n);
    if (!kRms && dweight != nullptr) db = load_part(dbias + j, n);
    const Vec w = weight == nullptr ? splat(1.0f) : load_part(weight + j, n);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec grad = load_part(dy[i] + j, n);  // 0 beyond the row
      const Vec xhat = normalised(i, j, n);
      dw = fma(grad, xhat, dw);
      if (!kRms) db = db + grad;
      const Vec g = grad * w;
      if (!kRms) sum_g[i] = sum_g[i] + g;
      sum_gx[i] = fma(g, xhat, sum_gx[i]);
    }
    if (dweight != nullptr) store_part(dweight + j, dw, n);
    if (!kRms && dweight != nullptr) store_part(dbias + j, db, n);
  };
  int64_t j = 0;
  for (; j + kLanes <= a.cols; j += kLanes) sums(j, kLanes);
  if (j < a.cols) sums(j, static_cast<int>(a.cols - j));
  if (a.dx == nullptr) return;
  const float inverse_cols = 1.0f / static_cast<float>(a.cols);
  for (int i = 0; i < kRows; ++i) {
    const float mean_g = kRms ? 0.0f : sum(sum_g[i]) * inverse_cols, mean_gx = sum(sum_gx[i]) * inverse_cols;
    const int64_t start = (r + i) * a.cols;
    T* dx = static_cast<T*>(a.dx) + start;
    const T* dsum = a.dsum == nullptr ? nullptr : static_cast<const T*>(a.dsum) + start;
    BFloat16* dx_half = a.dx_half == nullptr ? nullptr : static_cast<BFloat16*>(a.dx_half) + start;
    for_vectors(a.cols, [&](int64_t j, int n, int) {
      Vec g = load_part(dy[i] + j, n);
      if (weight != nullptr) g = g * load_part(weight + j, n);
      const Vec xhat = normalised(i, j, n);
      Vec v = rstd[i] * ((kRms ? g : g - mean_g) - xhat * mean_gx);
      if (dsum != nullptr) v = v + load_part(dsum + j, n);
      store_part(dx + j, v, n);
      if (dx_half != nullptr) store_part(dx_half + j, v, n);
    });
  }
}

void layer_norm_backward(const LayerNormBackwardArgs& a, int threads) {
  const bool params = a.dweight != nullptr || a.dbias != nullptr;
  const int64_t rows_a_block = (a.rows + kLayerNormBlocks - 1) / kLayerNormBlocks;
  std::vector<float> sums(params ? kLayerNormBlocks * 2 * a.cols : 0);
  with_type(a.dtype, [&](auto tag) {
    with_norm(a.mean == nullptr, a.param_dtype, [&](auto rms, auto param_tag) {
      constexpr bool kRms = decltype(rms)::value;
      using T = decltype(tag);
      using P = decltype(param_tag);
      const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, rows_a_block * a.cols));
      parallel_for(kLayerNormBlocks, grain, threads, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          float* dweight = params ? sums.data() + block * 2 * a.cols : nullptr;
          float* dbias = params ? dweight + a.cols : nullptr;
          int64_t r = std::min(a.rows, block * rows_a_block);
          const int64_t end = std::min(a.rows, r + rows_a_block);
          for (; r + kLayerNormGroup <= end; r += kLayerNormGroup) {
            layer_norm_backward_group<kRms, kLayerNormGroup, T, P>(a, r, dweight, dbias);
          }
          for (; r < end; ++r) layer_norm_backward_group<kRms, 1, T, P>(a, r, dweight, dbias);
        }
      });
      if (!params) return;
      for (int64_t j = 0; j < a.cols; j += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, a.cols - j));
        Vec dweight = {}, dbias = {};
        for (int64_t block = 0; block < kLayerNormBlocks; ++block) {
          dweight = dweight + load_part(sums.data() + block * 2 * a.cols + j, n);
          dbias = dbias + load_part(sums.data() + (block * 2 + 1) * a.cols + j, n);
        }
        if (a.dweight != nullptr) store_part(static_cast<P*>(a.dweight) + j, dweight, n);
        if (a.dbias != nullptr) store_part(static_cast<P*>(a.dbias) + j, dbias, n);
      }
    });
  });
}
