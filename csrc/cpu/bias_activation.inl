// y = f(x + bias) over rows, and its gradients: dx = dy f'(x + bias), dbias = sum_rows dx. The sum x + bias is not
// rounded.

template <class F, class T, class P>
INLINE void bias_activation_rows(const BiasActivationArgs& a, int64_t begin, int64_t end) {
  const P* bias = static_cast<const P*>(a.bias);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.cols;
    T* y = static_cast<T*>(a.y) + r * a.cols;
    int64_t j = 0;
    for (; j + kLanes <= a.cols; j += kLanes) store(y + j, F::template forward<T>(load(x + j) + load(bias + j)));
    const int rest = static_cast<int>(a.cols - j);
    if (rest > 0) store_n(y + j, F::template forward<T>(load_n(x + j, rest) + load_n(bias + j, rest)), rest);
  }
}

void bias_activation(const BiasActivationArgs& a, int threads) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a.cols));
  with_activation(a.kind, [&](auto f) {
    with_type(a.dtype, [&](auto tag) {
      with_type(a.bias_dtype, [&](auto bias_tag) {
        parallel_for(a.rows, grain, threads, [&](int64_t begin, int64_t end) {
          bias_activation_rows<decltype(f), decltype(tag), decltype(bias_tag)>(a, begin, end);
        });
      });
    });
  });
}

// Sums over rows are kept a block of rows each and added in the blocks' order: the same for any number of threads.
constexpr int64_t kBiasBlocks = 16;

template <class F, class T, class P>
INLINE void bias_activation_backward_rows(const BiasActivationBackwardArgs& a, int64_t begin, int64_t end,
                                          float* sums) {
  const P* bias = static_cast<const P*>(a.bias);
  for (int64_t r = begin; r < end; ++r) {
    const T* dy = static_cast<const T*>(a.dy) + r * a.cols;
    const T* saved = static_cast<const T*>(a.saved) + r * a.cols;
    T* dx = static_cast<T*>(a.dx) + r * a.cols;
    const auto part = [&](int64_t j, int n) {
      Vec kept = load_part(saved + j, n);
      if (F::kKeepsInput) kept = kept + load_part(bias + j, n);
      const Vec grad = gradient_of<T>(F{}, load_part(dy + j, n), kept);
      store_part(dx + j, grad, n);
      if (sums != nullptr) store_part(sums + j, load_part(sums + j, n) + grad, n);
    };
    int64_t j = 0;
    for (; j + kLanes <= a.cols; j += kLanes) part(j, kLanes);
    if (j < a.cols) part(j, static_cast<int>(a.cols - j));
  }
}

void bias_activation_backward(const BiasActivationBackwardArgs& a, int threads) {
  const int64_t rows_a_block = (a.rows + kBiasBlocks - 1) / kBiasBlocks;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, rows_a_block * a.cols));
  std::vector<float> sums(a.dbias == nullptr ? 0 : kBiasBlocks * a.cols);
  with_activation(a.kind, [&](auto f) {
    with_type(a.dtype, [&](auto tag) {
      with_type(a.bias_dtype, [&](auto bias_tag) {
        using P = decltype(bias_tag);
        parallel_for(kBiasBlocks, grain, threads, [&](int64_t first, int64_t last) {
          for (int64_t block = first; block < last; ++block) {
            const int64_t begin = std::min(a.rows, block * rows_a_block), end = std::min(a.rows, begin + rows_a_block);
            float* mine = a.dbias == nullptr ? nullptr : sums.data() + block * a.cols;
            bias_activation_backward_rows<decltype(f), decltype(tag), P>(a, begin, end, mine);
          }
        });
        if (a.dbias == nullptr) return;
        for (int64_t j = 0; j < a.cols; j += kLanes) {
          const int n = static_cast<int>(std::min<int64_t>(kLanes, a.cols - j));
          Vec total = {};
          for (int64_t block = 0; block < kBiasBlocks; ++block) total = total + load_part(&sums[block * a.cols + j], n);
          store_part(static_cast<P*>(a.dbias) + j, total, n);
        }
      });
    });
  });
}
