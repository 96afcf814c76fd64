// Element-wise activations, forward and backward, on n contiguous elements.
//
//   relu(x)      = max(x, 0)                            dx = dy [y > 0]
//   sigmoid(x)   = 1 / (1 + exp(-x))                    dx = dy y (1 - y)
//   tanh(x)                                             dx = dy (1 - y^2)
//   gelu(x)      = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2      dx = dy (Phi(x) + x phi(x))
//   gelu_tanh(x) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)  (equal to x (1 + tanh u) / 2, with one division)
//   silu(x)      = x sigmoid(x)                         dx = dy s (1 + x (1 - s))
//
// GELU: arXiv 1606.08415.

// `backward` takes the input where kKeepsInput is set, the result where it is not; value_and_slope gives f(x) and
// f'(x). All compute to the precision of results of type T.

struct ReLU {
  static constexpr bool kKeepsInput = false;
  template <class T = float>
  static INLINE Vec forward(Vec x) {
    return x < 0.0f ? Vec{} : x;
  }
  static INLINE Vec backward(Vec dy, Vec y) { return y <= 0.0f ? Vec{} : dy; }
};

struct Sigmoid {
  static constexpr bool kKeepsInput = false;
  template <class T = float>
  static INLINE Vec forward(Vec x) {
    return quotient_to<T>(splat(1.0f), 1.0f + exp_to<T>(-x));
  }
  static INLINE Vec backward(Vec dy, Vec y) { return dy * ((1.0f - y) * y); }
};

struct Tanh {
  static constexpr bool kKeepsInput = false;
  template <class T = float>
  static INLINE Vec forward(Vec x) {
    return sizeof(T) == 2 ? tanh_half(x) : tanh(x);
  }
  static INLINE Vec backward(Vec dy, Vec y) { return dy * (1.0f - y * y); }
};

struct GELU {
  static constexpr bool kKeepsInput = true;
  // Phi and its slope.
  static INLINE std::pair<Vec, Vec> cdf_and_density(Vec x) {
#if FASTGPT_LANES == 16
    const auto [tail, density] = normal_tail_and_density(x);
    return {x < 0.0f ? tail : 1.0f - tail, density};
#else
    return {0.5f + 0.5f * erf(x * 0.707106781186547524f), 0.398942280401432678f * exp(-0.5f * x * x)};
#endif
  }
  template <class T = float>
  static INLINE Vec forward(Vec x) {
    return x * cdf_and_density(x).first;
  }
  template <class T = float>
  static INLINE std::pair<Vec, Vec> value_and_slope(Vec x) {
    const auto [cdf, density] = cdf_and_density(x);
    return {x * cdf, fma(x, density, cdf)};
  }
  template <class T = float>
  static INLINE Vec backward(Vec dy, Vec x) {
    return dy * value_and_slope<T>(x).second;
  }
};

struct GELUTanh {
  static constexpr bool kKeepsInput = true;
  static constexpr float kTwice = 1.59576912160573071f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;
  template <class T = float>
  static INLINE Vec forward(Vec x) {
    const Vec twice_u = kTwice * x * fma(splat(kCubic) * x, x, splat(1.0f));
    return quotient_to<T>(x, 1.0f + exp_to<T>(-twice_u));
  }
  template <class T = float>
  static INLINE std::pair<Vec, Vec> value_and_slope(Vec x) {
    const Vec square = x * x;
    const Vec e = exp_to<T>(min(splat(88.0f), -(kTwice * x * fma(splat(kCubic), square, splat(1.0f)))));
    const Vec s = quotient_to<T>(splat(1.0f), 1.0f + e);
    const Vec slope = kTwice * fma(splat(3.0f * kCubic), square, splat(1.0f));  // d(2u)/dx
    return {x * s, s * fma(x * (e * s), slope, splat(1.0f))};                   // e s is 1 - s without its cancellation
  }
  template <class T = float>
  static INLINE Vec backward(Vec dy, Vec x) {
    return dy * value_and_slope<T>(x).second;
  }
};

struct SiLU {
  static constexpr bool kKeepsInput = true;
  template <class T = float>
  static INLINE Vec forward(Vec x) {
    return quotient_to<T>(x, 1.0f + exp_to<T>(-x));
  }
  template <class T = float>
  static INLINE std::pair<Vec, Vec> value_and_slope(Vec x) {
    const Vec e = exp_to<T>(min(splat(88.0f), -x));
    const Vec s = quotient_to<T>(splat(1.0f), 1.0f + e);
    return {x * s, s * fma(x, e * s, splat(1.0f))};  // e s is 1 - s without its cancellation
  }
  template <class T = float>
  static INLINE Vec backward(Vec dy, Vec x) {
    return dy * value_and_slope<T>(x).second;
  }
};

// f's gradient to the precision of T.
template <class T, class F>
INLINE Vec gradient_of(F, Vec dy, Vec saved) {
  if constexpr (F::kKeepsInput) {
    return F::template backward<T>(dy, saved);
  } else {
    return F::backward(dy, saved);
  }
}

template <class Body>
INLINE void with_activation(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::kReLU:
      return body(ReLU{});
    case Activation::kSigmoid:
      return body(Sigmoid{});
    case Activation::kTanh:
      return body(Tanh{});
    case Activation::kGELU:
      return body(GELU{});
    case Activation::kGELUTanh:
      return body(GELUTanh{});
    case Activation::kSiLU:
      return body(SiLU{});
  }
}

// Calls body(i, n, past) for the vectors in [0, size) of a pointwise pass: n elements from i on. A large result is
// written past the caches where `out` allows it (`past` is a constant then), so that its lines are not read first.
template <class T, class Body>
INLINE void for_elements(const T* out, int64_t size, int threads, const Body& body) {
  const bool past = size * static_cast<int64_t>(sizeof(T)) >= kPastCaches && is_aligned(out);
  const int64_t blocks = (size + kElementBlock - 1) / kElementBlock;
  const auto run = [&](auto constant) {
    parallel_for(blocks, kGrain / kElementBlock, threads, [&](int64_t first, int64_t last) {
      const int64_t end = std::min(size, last * kElementBlock);
      int64_t i = first * kElementBlock;
      for (; i + kLanes <= end; i += kLanes) body(i, kLanes, constant);
      if (i < end) body(i, static_cast<int>(end - i), std::false_type{});
      if (constant.value) fence();
    });
  };
  past ? run(std::true_type{}) : run(std::false_type{});
}

void activation(Activation kind, DType dtype, const void* x, void* y, int64_t n, int threads) {
  with_activation(kind, [&](auto f) {
    with_type(dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* in = static_cast<const T*>(x);
      T* out = static_cast<T*>(y);
      for_elements(out, n, threads, [=](int64_t i, int count, auto past) {
        const Vec v = f.template forward<T>(load_part(in + i, count));
        past.value ? store_past(out + i, v) : store_part(out + i, v, count);
      });
    });
  });
}

void activation_backward(Activation kind, DType dtype, const void* dy, const void* saved, void* dx, int64_t n,
                         int threads) {
  with_activation(kind, [&](auto f) {
    with_type(dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* grad = static_cast<const T*>(dy);
      const T* kept = static_cast<const T*>(saved);
      T* out = static_cast<T*>(dx);
      for_elements(out, n, threads, [=](int64_t i, int count, auto past) {
        const Vec v = gradient_of<T>(f, load_part(grad + i, count), load_part(kept + i, count));
        past.value ? store_past(out + i, v) : store_part(out + i, v, count);
      });
    });
  });
}
