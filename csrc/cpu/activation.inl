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
// f'(x).

struct ReLU {
  static constexpr bool kKeepsInput = false;
  static INLINE Vec forward(Vec x) { return x < 0.0f ? Vec{} : x; }
  static INLINE Vec backward(Vec dy, Vec y) { return y <= 0.0f ? Vec{} : dy; }
};

struct Sigmoid {
  static constexpr bool kKeepsInput = false;
  static INLINE Vec forward(Vec x) { return sigmoid(x); }
  static INLINE Vec backward(Vec dy, Vec y) { return dy * ((1.0f - y) * y); }
};

struct Tanh {
  static constexpr bool kKeepsInput = false;
  static INLINE Vec forward(Vec x) { return tanh(x); }
  static INLINE Vec backward(Vec dy, Vec y) { return dy * (1.0f - y * y); }
};

struct GELU {
  static constexpr bool kKeepsInput = true;
  static INLINE Vec cdf(Vec x) { return 0.5f + 0.5f * erf(x * 0.707106781186547524f); }
  static INLINE Vec forward(Vec x) { return x * cdf(x); }
  static INLINE std::pair<Vec, Vec> value_and_slope(Vec x) {
    Vec pdf = 0.398942280401432678f * exp(-0.5f * x * x);
    Vec below = cdf(x);
    return {x * below, fma(x, pdf, below)};
  }
  static INLINE Vec backward(Vec dy, Vec x) { return dy * value_and_slope(x).second; }
};

struct GELUTanh {
  static constexpr bool kKeepsInput = true;
  static constexpr float kTwice = 1.59576912160573071f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;
  static INLINE Vec forward(Vec x) {
    Vec twice_u = kTwice * x * fma(splat(kCubic) * x, x, splat(1.0f));
    return x / (1.0f + exp(-twice_u));
  }
  static INLINE std::pair<Vec, Vec> value_and_slope(Vec x) {
    Vec square = x * x;
    Vec e = exp(min(splat(88.0f), -(kTwice * x * fma(splat(kCubic), square, splat(1.0f)))));
    Vec s = 1.0f / (1.0f + e);
    Vec slope = kTwice * fma(splat(3.0f * kCubic), square, splat(1.0f));  // d(2u)/dx
    return {x * s, s * fma(x * (e * s), slope, splat(1.0f))};             // e s is 1 - s without its cancellation
  }
  static INLINE Vec backward(Vec dy, Vec x) { return dy * value_and_slope(x).second; }
};

struct SiLU {
  static constexpr bool kKeepsInput = true;
  static INLINE Vec forward(Vec x) { return x / (1.0f + exp(-x)); }
  static INLINE std::pair<Vec, Vec> value_and_slope(Vec x) {
    Vec e = exp(min(splat(88.0f), -x));
    Vec s = 1.0f / (1.0f + e);
    return {x * s, s * fma(x, e * s, splat(1.0f))};  // e s is 1 - s without its cancellation
  }
  static INLINE Vec backward(Vec dy, Vec x) { return dy * value_and_slope(x).second; }
};

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

void activation(Activation kind, DType dtype, const void* x, void* y, int64_t n, int threads) {
  with_activation(kind, [&](auto f) {
    with_type(dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* in = static_cast<const T*>(x);
      T* out = static_cast<T*>(y);
      parallel_for(n, kGrain, threads, [=](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) store(out + i, f.forward(load(in + i)));
        int rest = static_cast<int>(end - i);
        if (rest > 0) store_n(out + i, f.forward(load_n(in + i, rest)), rest);
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
      parallel_for(n, kGrain, threads, [=](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) store(out + i, f.backward(load(grad + i), load(kept + i)));
        int rest = static_cast<int>(end - i);
        if (rest > 0) store_n(out + i, f.backward(load_n(grad + i, rest), load_n(kept + i, rest)), rest);
      });
    });
  });
}
