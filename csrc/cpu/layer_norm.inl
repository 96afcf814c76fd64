// Layer normalisation over the last dimension (arXiv 1607.06450), forward and backward.
//
//   xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps),  y = xhat * weight + bias   (var without Bessel's
//   correction) g = dy * weight;  dx = rstd * (g - mean(g) - xhat * mean(g * xhat));  dweight = sum_rows dy * xhat;
//   dbias = sum_rows dy
//
// The variance is that of the centred row, in a second pass over a row that is in L1 by then: no cancellation.

template <class T, class P>
INLINE void layer_norm_rows(const LayerNormArgs& a, int64_t begin, int64_t end) {
  const P* weight = static_cast<const P*>(a.weight);
  const P* bias = static_cast<const P*>(a.bias);
  const float inverse_cols = 1.0f / static_cast<float>(a.cols);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.cols;
    T* y = static_cast<T*>(a.y) + r * a.cols;
    Vec total = {};
    for (int64_t j = 0; j < a.cols; j += kLanes) total = total + load_part(x + j, static_cast<int>(a.cols - j));
    const float mean = sum(total) * inverse_cols;
    Vec squares = {};
    int64_t j = 0;
    for (; j + kLanes <= a.cols; j += kLanes) {
      Vec centred = load(x + j) - mean;
      squares = fma(centred, centred, squares);
    }
    const int rest = static_cast<int>(a.cols - j);
    if (rest > 0) {
      Vec centred = load_n(x + j, rest, mean) - mean;
      squares = fma(centred, centred, squares);
    }
    const float rstd = 1.0f / std::sqrt(sum(squares) * inverse_cols + a.eps);
    a.mean[r] = mean;
    a.rstd[r] = rstd;
    for (j = 0; j < a.cols; j += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, a.cols - j));
      Vec v = (load_part(x + j, n) - mean) * rstd;
      if (weight != nullptr) v = v * load_part(weight + j, n);
      if (bias != nullptr) v = v + load_part(bias + j, n);
      store_part(y + j, v, n);
    }
  }
}

void layer_norm(const LayerNormArgs& a, int threads) {
  with_type(a.dtype, [&](auto tag) {
    with_type(a.param_dtype, [&](auto param_tag) {
      parallel_for(
          a.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a.cols)), threads,
          [&](int64_t begin, int64_t end) { layer_norm_rows<decltype(tag), decltype(param_tag)>(a, begin, end); });
    });
  });
}

// The sums over rows are kept a block of rows each and added in the blocks' order, so they do not depend on the number
// of threads.
constexpr int64_t kLayerNormBlocks = 16;

template <class T, class P>
INLINE void layer_norm_backward_rows(const LayerNormBackwardArgs& a, int64_t begin, int64_t end, float* dweight,
                                     float* dbias) {
  const P* weight = static_cast<const P*>(a.weight);
  const float inverse_cols = 1.0f / static_cast<float>(a.cols);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.cols;
    const T* dy = static_cast<const T*>(a.dy) + r * a.cols;
    const float mean = a.mean[r], rstd = a.rstd[r];
    Vec sum_g = {}, sum_gx = {};
    for (int64_t j = 0; j < a.cols; j += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, a.cols - j));
      Vec grad = load_part(dy + j, n);  // 0 beyond the row
      Vec xhat = (load_part(x + j, n) - mean) * rstd;
      if (dweight != nullptr) {
        store_part(dweight + j, fma(grad, xhat, load_part(dweight + j, n)), n);
        store_part(dbias + j, load_part(dbias + j, n) + grad, n);
      }
      if (weight != nullptr) grad = grad * load_part(weight + j, n);
      sum_g = sum_g + grad;
      sum_gx = fma(grad, xhat, sum_gx);
    }
    if (a.dx == nullptr) continue;
    T* dx = static_cast<T*>(a.dx) + r * a.cols;
    const float mean_g = sum(sum_g) * inverse_cols, mean_gx = sum(sum_gx) * inverse_cols;
    for (int64_t j = 0; j < a.cols; j += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, a.cols - j));
      Vec grad = load_part(dy + j, n);
      if (weight != nullptr) grad = grad * load_part(weight + j, n);
      Vec xhat = (load_part(x + j, n) - mean) * rstd;
      store_part(dx + j, rstd * (grad - mean_g - xhat * mean_gx), n);
    }
  }
}

void layer_norm_backward(const LayerNormBackwardArgs& a, int threads) {
  const bool params = a.dweight != nullptr || a.dbias != nullptr;
  const int64_t rows_a_block = (a.rows + kLayerNormBlocks - 1) / kLayerNormBlocks;
  std::vector<float> sums(params ? kLayerNormBlocks * 2 * a.cols : 0);
  with_type(a.dtype, [&](auto tag) {
    with_type(a.param_dtype, [&](auto param_tag) {
      using P = decltype(param_tag);
      const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, rows_a_block * a.cols));
      parallel_for(kLayerNormBlocks, grain, threads, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          float* dweight = params ? sums.data() + block * 2 * a.cols : nullptr;
          float* dbias = params ? dweight + a.cols : nullptr;
          const int64_t begin = std::min(a.rows, block * rows_a_block), end = std::min(a.rows, begin + rows_a_block);
          layer_norm_backward_rows<decltype(tag), P>(a, begin, end, dweight, dbias);
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
