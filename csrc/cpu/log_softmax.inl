// Row log-softmax and its backward, on cross_entropy's passes over a row (cross_entropy.inl).
//
//   y_j = (x_j - m) - log sum exp(x - m),  m = max x
//   dx = dy - exp(y) sum(dy)
//
// A row that holds a NaN or +inf, or nothing but -inf, is NaN, as in torch.

void log_softmax(const LogSoftmaxArgs& a, int threads) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(a.rows, std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, a.cols)), threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r) {
                     const T* x = static_cast<const T*>(a.x) + r * a.cols;
                     T* y = static_cast<T*>(a.y) + r * a.cols;
                     const float maximum = row_maximum(x, a.cols, false).maximum;
                     const T* next = r + 1 < a.rows ? x + a.cols : x;
                     // Subtracting the maximum first keeps rows far from 0 exact: x - lse alone would round lse.
                     const float rest = std::log(sum_of_exp(x, a.cols, maximum, nullptr, next));
                     for_parts(
                         a.cols,
                         [&](int64_t j) {
                           for (int i = 0; i < 4; ++i)
                             store(y + j + i * kLanes, (load(x + j + i * kLanes) - maximum) - rest);
                         },
                         [&](int64_t j, int n) { store_part(y + j, (load_part(x + j, n) - maximum) - rest, n); });
                   }
                 });
  });
}

void log_softmax_backward(const LogSoftmaxBackwardArgs& a, int threads) {
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(a.rows, std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, a.cols)), threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r) {
                     const T* dy = static_cast<const T*>(a.dy) + r * a.cols;
                     const T* y = static_cast<const T*>(a.y) + r * a.cols;
                     T* dx = static_cast<T*>(a.dx) + r * a.cols;
                     Vec parts[4] = {};
                     for_parts(
                         a.cols,
                         [&](int64_t j) {
                           for (int i = 0; i < 4; ++i) parts[i] = parts[i] + load(dy + j + i * kLanes);
                         },
                         [&](int64_t j, int n) { parts[0] = parts[0] + load_part(dy + j, n); });
                     const float total = sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
                     const auto one = [&](int64_t j, int n) {
                       store_part(dx + j, load_part(dy + j, n) - exp(load_part(y + j, n)) * total, n);
                     };
                     for_parts(
                         a.cols,
                         [&](int64_t j) {
                           for (int i = 0; i < 4; ++i) one(j + i * kLanes, kLanes);
                         },
                         one);
                   }
                 });
  });
}
