// Gated linear units without their products (arXiv 2002.05202): y = f(gate) * up, f is SiLU (SwiGLU) or GELU (GEGLU).
//
//   dup = dy * f(gate),  dgate = dy * up * f'(gate)
//
// Rows of gate and up may be strided, so both can be halves of one tensor, and so can their gradients.

template <class Body>
INLINE void with_gate(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::kGELU:
      return body(GELU{});
    case Activation::kGELUTanh:
      return body(GELUTanh{});
    default:
      return body(SiLU{});
  }
}

// Calls body(row, first column, columns) for the parts of rows in [begin, end) of all elements.
template <class Body>
INLINE void for_row_parts(int64_t begin, int64_t end, int64_t cols, const Body& body) {
  int64_t row = begin / cols, col = begin % cols;
  while (begin < end) {
    const int64_t n = std::min(cols - col, end - begin);
    body(row, col, n);
    begin += n;
    ++row;
    col = 0;
  }
}

void swiglu(const SwiGLUArgs& a, int threads) {
  with_gate(a.kind, [&](auto f) {
    with_type(a.dtype, [&](auto tag) {
      using T = decltype(tag);
      parallel_for(a.rows * a.cols, kGrain, threads, [&](int64_t begin, int64_t end) {
        for_row_parts(begin, end, a.cols, [&](int64_t row, int64_t col, int64_t count) {
          const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + col;
          const T* up = static_cast<const T*>(a.up) + row * a.up_stride + col;
          T* y = static_cast<T*>(a.y) + row * a.cols + col;
          const auto part = [&](int64_t i, int n) {
            store_part(y + i, f.template forward<T>(load_part(gate + i, n)) * load_part(up + i, n), n);
          };
          int64_t i = 0;
          for (; i + kLanes <= count; i += kLanes) part(i, kLanes);
          if (i < count) part(i, static_cast<int>(count - i));
        });
      });
    });
  });
}

void swiglu_backward(const SwiGLUBackwardArgs& a, int threads) {
  with_gate(a.kind, [&](auto f) {
    with_type(a.dtype, [&](auto tag) {
      using T = decltype(tag);
      parallel_for(a.rows * a.cols, kGrain, threads, [&](int64_t begin, int64_t end) {
        for_row_parts(begin, end, a.cols, [&](int64_t row, int64_t col, int64_t count) {
          const T* dy = static_cast<const T*>(a.dy) + row * a.cols + col;
          const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + col;
          const T* up = static_cast<const T*>(a.up) + row * a.up_stride + col;
          T* dgate = static_cast<T*>(a.dgate) + row * a.grad_stride + col;
          T* dup = static_cast<T*>(a.dup) + row * a.grad_stride + col;
          const auto part = [&](int64_t i, int n) {
            const Vec grad = load_part(dy + i, n);
            const auto [value, slope] = f.template value_and_slope<T>(load_part(gate + i, n));
            store_part(dgate + i, grad * load_part(up + i, n) * slope, n);
            store_part(dup + i, grad * value, n);
          };
          int64_t i = 0;
          for (; i + kLanes <= count; i += kLanes) part(i, kLanes);
          if (i < count) part(i, static_cast<int>(count - i));
        });
      });
    });
  });
}
