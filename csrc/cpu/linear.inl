// Linear layers: y = activation(x W^T + bias) + residual and its gradients, W (out, in) as torch keeps it, or (in, out)
// in memory where `transposed`: the same products, with the other order of packing.
//
//   forward          y  = f(x W^T + b) + residual
//   backward_input   dx = (dy W) slope    (slope: the derivative of the activation that made x, kept by its forward)
//   backward_weight  dW = dy^T x, db = sum over the rows of dy, added to what is there where `accumulate`
//
// `half` allows products of bf16 pairs (where the chip has them), summed in fp32; without it numbers are multiplied in
// fp32 whatever their storage.

#if defined(FASTGPT_AMX)
template <class Body>
INLINE void with_math(bool, const Body& body) {  // what is not of bf16 is another table's
  body(BFloat16Math{});
}
#elif defined(FASTGPT_BF16_DOT)
template <class Body>
INLINE void with_math(bool half, const Body& body) {
  half ? body(BFloat16Math{}) : body(Float32Math{});
}
#else
template <class Body>
INLINE void with_math(bool, const Body& body) {
  body(Float32Math{});
}
#endif

INLINE Vec load_as(DType dtype, const void* p, int64_t i, int n) {
  return dtype == DType::kBFloat16 ? load_part(static_cast<const BFloat16*>(p) + i, n)
                                   : load_part(static_cast<const float*>(p) + i, n);
}

INLINE void store_as(DType dtype, void* p, int64_t i, Vec v, int n) {
  dtype == DType::kBFloat16 ? store_part(static_cast<BFloat16*>(p) + i, v, n)
                            : store_part(static_cast<float*>(p) + i, v, n);
}

constexpr int64_t kAnyDepth = std::numeric_limits<int64_t>::max();

// f(x), and f'(x) where `slope` is wanted.
template <class F>
INLINE Vec activate(F, Vec x, bool wanted, Vec& slope) {
  if constexpr (F::kKeepsInput) {
    if (!wanted) return F::forward(x);
    const std::pair<Vec, Vec> both = F::value_and_slope(x);
    slope = both.second;
    return both.first;
  } else {
    const Vec value = F::forward(x);
    slope = F::backward(splat(1.0f), value);
    return value;
  }
}

// Runs step(v, place, c, n) on every vector of a tile: place is its first number's offset in the result, c its column,
// n how many of its lanes count. `step` is inlined with a constant n where the tile is full.
template <class Step>
INLINE void finish_tile(int64_t r0, int64_t c0, int height, int width, int64_t stride, const float* tile,
                        const Step& step) {
  for (int i = 0; i < height; ++i, tile += kPanel) {
    const int64_t place = (r0 + i) * stride + c0;
    if (width == kPanel) {
#pragma GCC unroll 4
      for (int j = 0; j < kPanel; j += kLanes) step(load(tile + j), place + j, c0 + j, kLanes);
    } else {
      for (int j = 0; j < width; j += kLanes) {
        step(load(tile + j), place + j, c0 + j, std::min(kLanes, width - j));
      }
    }
  }
}

// The product of few rows with weights as they lie: (out, in), or (in, out) where transposed.
template <class Finish>
void few_rows_of(const Matrix& x, const Matrix& w, bool transposed, int64_t rows, int64_t in, int64_t out, int threads,
                 const Finish& finish) {
  with_matrix(x, 0, 0, [&](auto* numbers) {
    with_matrix(w, 0, 0, [&](auto* weight) {
      transposed ? few_rows_transposed(numbers, weight, rows, in, out, threads, finish)
                 : few_rows(numbers, weight, rows, in, out, threads, finish);
    });
  });
}

void linear(const LinearArgs& a, int threads) {
  const auto finish = [&](int64_t r0, int64_t c0, int height, int width, const float* tile) {
    with_type(a.y_dtype, [&](auto y_tag) {
      using Y = decltype(y_tag);
      Y* y = static_cast<Y*>(a.y);
      Y* slope = static_cast<Y*>(a.slope);
      const auto add_bias = [&](Vec v, int64_t c, int n) {
        return a.bias == nullptr ? v : v + load_as(a.w_dtype, a.bias, c, n);
      };
      const auto add_residual = [&](Vec v, int64_t place, int n) {
        return a.residual == nullptr ? v : v + load_as(a.residual_dtype, a.residual, place, n);
      };
      if (!a.has_activation) {
        finish_tile(r0, c0, height, width, a.out, tile, [&](Vec v, int64_t place, int64_t c, int n) {
          store_part(y + place, add_residual(add_bias(v, c, n), place, n), n);
        });
        return;
      }
      with_activation(a.activation, [&](auto f) {
        finish_tile(r0, c0, height, width, a.out, tile, [&](Vec v, int64_t place, int64_t c, int n) {
          Vec derivative = {};
          const Vec value = activate(f, add_bias(v, c, n), slope != nullptr, derivative);
          if (slope != nullptr) store_part(slope + place, derivative, n);
          store_part(y + place, add_residual(value, place, n), n);
        });
      });
    });
  };
  const Matrix x{a.x_dtype, a.x, a.in}, w{a.w_dtype, a.weight, a.transposed ? a.out : a.in};
  if (a.rows <= kFewRows) {
    few_rows_of(x, w, a.transposed, a.rows, a.in, a.out, threads, finish);
    return;
  }
  with_math(a.half, [&](auto math) {
    a.transposed ? product<decltype(math), false, false>(x, w, a.rows, a.out, a.in, kAnyDepth, threads, {}, finish)
                 : product<decltype(math), false, true>(x, w, a.rows, a.out, a.in, kAnyDepth, threads, {}, finish);
  });
}

void linear_backward_input(const LinearBackwardInputArgs& a, int threads) {
  const auto finish = [&](int64_t r0, int64_t c0, int height, int width, const float* tile) {
    with_type(a.dx_dtype, [&](auto dx_tag) {
      using X = decltype(dx_tag);
      X* dx = static_cast<X*>(a.dx);
      finish_tile(r0, c0, height, width, a.in, tile, [&](Vec v, int64_t place, int64_t, int n) {
        store_part(dx + place, a.slope == nullptr ? v : v * load_as(a.slope_dtype, a.slope, place, n), n);
      });
    });
  };
  const Matrix dy{a.dy_dtype, a.dy, a.out}, w{a.w_dtype, a.weight, a.transposed ? a.out : a.in};
  if (a.rows <= kFewRows) {
    few_rows_of(dy, w, !a.transposed, a.rows, a.out, a.in, threads, finish);
    return;
  }
  with_math(a.half, [&](auto math) {
    a.transposed ? product<decltype(math), false, true>(dy, w, a.rows, a.in, a.out, kAnyDepth, threads, {}, finish)
                 : product<decltype(math), false, false>(dy, w, a.rows, a.in, a.out, kAnyDepth, threads, {}, finish);
  });
}

constexpr int64_t kRowsAtOnce = 1024;  // of a weight gradient's long sum: what L2 holds of both sides

void linear_backward_weight(const LinearBackwardWeightArgs& a, int threads) {
  if (a.dweight != nullptr) {
    // An fp32 gradient is where its parts are summed; one in bf16 is summed elsewhere and rounded once.
    const bool direct = a.dw_dtype == DType::kFloat32;
    // dW = dy^T x, or its transpose x^T dy.
    Matrix left{a.dy_dtype, a.dy, a.out}, right{a.x_dtype, a.x, a.in};
    if (a.transposed) std::swap(left, right);
    const int64_t columns = right.stride;
    const Sums sums = {direct ? static_cast<float*>(a.dweight) : nullptr, direct && a.accumulate};
    const auto finish = [&](int64_t r0, int64_t c0, int height, int width, const float* tile) {
      with_type(a.dw_dtype, [&](auto tag) {
        using W = decltype(tag);
        W* dweight = static_cast<W*>(a.dweight);
        finish_tile(r0, c0, height, width, columns, tile, [&](Vec v, int64_t place, int64_t, int n) {
          if (a.accumulate && !direct) v += load_part(dweight + place, n);
          store_part(dweight + place, v, n);
        });
      });
    };
    with_math(a.half, [&](auto math) {
      product<decltype(math), true, false>(left, right, left.stride, columns, a.rows, kRowsAtOnce, threads, sums,
                                           finish);
    });
  }
  if (a.dbias == nullptr) return;
  with_type(a.dy_dtype, [&](auto tag) {
    const auto* dy = static_cast<const decltype(tag)*>(a.dy);
    const int64_t vectors = (a.out + kLanes - 1) / kLanes;
    parallel_for(vectors, std::max<int64_t>(1, kGrain / (kLanes * a.rows + 1)), threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t vector = begin; vector < end; ++vector) {
                     const int64_t c = vector * kLanes;
                     const int n = static_cast<int>(std::min<int64_t>(kLanes, a.out - c));
                     Vec total = {};
                     for (int64_t r = 0; r < a.rows; r += kChain) {
                       Vec part = {};
                       for (int64_t i = r; i < std::min(a.rows, r + kChain); ++i)
                         part += load_part(dy + i * a.out + c, n);
                       total += part;
                     }
                     if (a.accumulate) total += load_as(a.db_dtype, a.dbias, c, n);
                     store_as(a.db_dtype, a.dbias, c, total, n);
                   }
                 });
  });
}
