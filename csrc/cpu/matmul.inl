// Register-blocked products of small dense blocks, and the packing they want.
//
//   C(r, c) = sum_k A(r, k) B(k, c)
//
// A is read one term at a time and broadcast; B's and C's rows are vectors. A tile of kTileRows x kTileColumns vectors
// of C stays in registers for the whole sum. A `Math` says what one term is: a float, or (where the chip multiplies
// bf16 pairs) two neighbouring terms of the sum in one 32-bit lane. Blocks are scratch memory of the caller's: padded,
// aligned, and small enough for L1 or L2.

#if defined(FASTGPT_AMX)
#include "cpu/amx_tile.inl"
constexpr int kTileRows = kTileSide;
#else
constexpr int kTileRows = FASTGPT_LANES == 16 ? 8 : 4;
class Tiles {};  // for AMX, what a thread has to prepare
#endif
constexpr int kTileColumns = FASTGPT_LANES == 16 ? 3 : 2;  // 24 accumulators of 32 registers, 8 of 16

INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Float32Math {
  using Element = float;
  static constexpr int kTerms = 1;
  static INLINE Vec broadcast(const float* p) { return splat(*p); }
  static INLINE Vec vector(const float* p) { return load(p); }
  static INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if defined(FASTGPT_BF16_DOT)
struct BFloat16Math {
  using Element = uint32_t;  // terms 2k (low half) and 2k + 1 (high half)
  static constexpr int kTerms = 2;
  static INLINE Vec broadcast(const uint32_t* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof pair);  // a packed pair, or two neighbours of a tensor
    return bit_cast<Vec>(pair - VecUInt{});
  }
  static INLINE Vec vector(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

INLINE VecHalf to_halves(Vec v) {
#if defined(FASTGPT_BF16_DOT)
  return bit_cast<VecHalf>(_mm512_cvtneps_pbh((__m512)v));
#else
  return to_bfloat16(v);
#endif
}

// Lane by lane, the bf16 of `even` (low half) and `odd` (high half).
INLINE VecUInt to_pairs(Vec even, Vec odd) {
#if defined(FASTGPT_BF16_DOT)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (VecUInt)_mm512_permutexvar_epi16(order, halves);
#else
  return __builtin_convertvector(to_bfloat16(even), VecUInt) |
         (__builtin_convertvector(to_bfloat16(odd), VecUInt) << 16);
#endif
}

// One tile of kRows: last(c, rows) takes its column of vectors c, a vector a row (by reference: a lambda in a template
// that returns a vector is compiled for the base target's ABI). A(r, k) lies at a[r * lda + k], or at a[k * lda + r]
// where kTransposed; B's row k at b[k * ldb].
template <class Math, bool kTransposed, int kColumns, int kRows, class Last>
INLINE void multiply_tile(const typename Math::Element* a, int64_t lda, const typename Math::Element* b, int64_t ldb,
                          int64_t depth, const Last& last) {
  Vec acc[kColumns][kRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) row[c] = Math::vector(b + k * ldb + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec term = Math::broadcast(kTransposed ? a + k * lda + r : a + r * lda + k);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) acc[c][r] = Math::multiply_add(term, row[c], acc[c][r]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) last(c, acc[c]);
}

// kTileRows rows of C, its vectors c0 <= c < c1: tiles as even as they can be. last sees the vector's own number.
template <class Math, bool kTransposed, class Last>
INLINE void multiply_rows(const typename Math::Element* a, int64_t lda, const typename Math::Element* b, int64_t ldb,
                          int64_t depth, int c0, int c1, const Last& last) {
#if defined(FASTGPT_AMX)
  if constexpr (Math::kTerms == 2) {
    multiply_rows_in_tiles<kTransposed>(a, lda, b, ldb, depth, c0, c1, last);
    return;
  }
#endif
  while (c0 < c1) {
    const int left = c1 - c0;
    const int tiles = (left + kTileColumns - 1) / kTileColumns;
    const int columns = (left + tiles - 1) / tiles;
    const auto tile = [&](auto count) {
      multiply_tile<Math, kTransposed, decltype(count)::value, kTileRows>(
          a, lda, b + c0 * kLanes, ldb, depth, [&](int c, const auto& rows) { last(c0 + c, rows); });
    };
    switch (columns) {
      case 1:
        tile(std::integral_constant<int, 1>{});
        break;
#if FASTGPT_LANES == 16
      case 3:
        tile(std::integral_constant<int, 3>{});
        break;
#endif
      default:
        tile(std::integral_constant<int, 2>{});
        break;
    }
    c0 += columns;
  }
}

// Terms that one sum may run over before it is added to another: rounding errors grow with the length of a chain.
constexpr int64_t kChain = 64;

// The same for a long sum (the width of a head): in chains, kept in C (a row every ldc) from one to the next; the whole
// sum goes to last.
template <class Math, class Last>
INLINE void multiply_rows_in_chains(const typename Math::Element* a, int64_t lda, const typename Math::Element* b,
                                    int64_t ldb, int64_t depth, int c0, int c1, float* out, int64_t ldc,
                                    const Last& last) {
  for (int64_t k = 0; k < depth; k += kChain) {
    multiply_rows<Math, false>(a + k, lda, b + k * ldb, ldb, std::min(kChain, depth - k), c0, c1,
                               [&](int c, const auto& rows) {
                                 Vec sums[kTileRows];
                                 float* place = out + c * kLanes;
#pragma GCC unroll 8
                                 for (int r = 0; r < kTileRows; ++r) {
                                   sums[r] = k > 0 ? load(place + r * ldc) + rows[r] : rows[r];
                                   if (k + kChain < depth) store(place + r * ldc, sums[r]);
                                 }
                                 if (k + kChain >= depth) last(c, sums);
                               });
  }
}

// ---- packing

template <int kStep, bool kUpper, int... kLane>
INLINE Vec exchange(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  // Lower: a where the lane has no bit kStep, else b shifted up by kStep. Upper: a shifted down, else b.
  return __builtin_shufflevector(a, b,
                                 (kUpper ? ((kLane & kStep) ? kLanes + kLane : kLane + kStep)
                                         : ((kLane & kStep) ? kLanes + kLane - kStep : kLane))...);
}

template <int kStep>
INLINE void transpose_step(Vec (&x)[kLanes]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vec a = x[i], b = x[i + kStep];
    x[i] = exchange<kStep, false>(a, b, Lanes{});
    x[i + kStep] = exchange<kStep, true>(a, b, Lanes{});
  }
}

// A square of kLanes vectors in registers.
INLINE void transpose(Vec (&x)[kLanes]) {
#if FASTGPT_LANES == 16
  transpose_step<8>(x);
#endif
#if FASTGPT_LANES >= 8
  transpose_step<4>(x);
#endif
  transpose_step<2>(x);
  transpose_step<1>(x);
}

template <class Math>
struct Pack;

template <>
struct Pack<Float32Math> {
  // Rows of A or B: out(r, d) = x(r, d), 0 for d in [dim, ld). ld is a multiple of kLanes.
  template <class T>
  static INLINE void rows(const T* x, int64_t stride, int64_t n, int64_t dim, float* out, int64_t ld) {
    for (int64_t r = 0; r < n; ++r, x += stride, out += ld) {
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store(out + d, load(x + d));
      if (d < dim) store(out + d, load_n(x + d, static_cast<int>(dim - d)));
    }
  }

  // Rows of B where the sum runs over the rows: the same.
  template <class T>
  static INLINE void pairs(const T* x, int64_t stride, int64_t n, int64_t dim, float* out, int64_t ld) {
    rows(x, stride, n, dim, out, ld);
  }

  // B transposed: out(d, i) = x(i, d), 0 for i in [n, ld). ld is a multiple of kLanes.
  template <class T>
  static INLINE void columns(const T* x, int64_t stride, int64_t n, int64_t dim, float* out, int64_t ld) {
    for (int64_t i = 0; i < ld; i += kLanes) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int wide = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          const T* row = x + (i + r) * stride + d;
          square[r] = i + r >= n ? Vec{} : wide == kLanes ? load(row) : load_n(row, wide);
        }
        transpose(square);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          if (r < wide) store(out + (d + r) * ld + i, square[r]);
        }
      }
    }
  }
};

#if defined(FASTGPT_BF16_DOT)
template <>
struct Pack<BFloat16Math> {
  // 2 * kLanes neighbours, kLanes neighbours each in a lane of its own; 0 from n on. Floats are rounded to bf16.
  static INLINE VecUInt load_pairs(const BFloat16* p, int64_t n) {
    VecUInt v = {};
    if (n >= 2 * kLanes) {
      std::memcpy(&v, p, sizeof v);
    } else {
      std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(BFloat16));
    }
    return v;
  }

  static INLINE VecUInt load_pairs(const float* p, int64_t n) {
    Vec low, high = {};
    if (n >= 2 * kLanes) {
      low = load(p);
      high = load(p + kLanes);
    } else {
      low = load_part(p, static_cast<int>(n));
      if (n > kLanes) high = load_n(p + kLanes, static_cast<int>(n - kLanes));
    }
    return (VecUInt)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }

  // Rows of A: neighbours in a row make a pair. ld (in pairs) is a multiple of kLanes.
  template <class T>
  static INLINE void rows(const T* x, int64_t stride, int64_t n, int64_t dim, uint32_t* out, int64_t ld) {
    for (int64_t r = 0; r < n; ++r, x += stride, out += ld) {
      for (int64_t d = 0; d < dim; d += 2 * kLanes) {
        const VecUInt pairs = load_pairs(x + d, dim - d);
        std::memcpy(out + d / 2, &pairs, sizeof pairs);
      }
    }
  }

  static INLINE VecUInt widen(const BFloat16* p, int64_t n) {
    VecHalf half = {};
    if (n >= kLanes) {
      std::memcpy(&half, p, sizeof half);
    } else {
      std::memcpy(&half, p, static_cast<size_t>(n) * sizeof(BFloat16));
    }
    return __builtin_convertvector(half, VecUInt);
  }

  static INLINE VecUInt two_rows(const BFloat16* even, const BFloat16* odd, int64_t n) {
    VecUInt pair = widen(even, n);
    if (odd != nullptr) pair |= widen(odd, n) << 16;
    return pair;
  }

  static INLINE VecUInt two_rows(const float* even, const float* odd, int64_t n) {
    const int wide = static_cast<int>(std::min<int64_t>(n, kLanes));
    return to_pairs(load_part(even, wide), odd != nullptr ? load_part(odd, wide) : Vec{});
  }

  // Rows of B where the sum runs over the rows: out(r / 2, d) = (x(r, d), x(r + 1, d)), 0 beyond n rows or dim columns.
  template <class T>
  static INLINE void pairs(const T* x, int64_t stride, int64_t n, int64_t dim, uint32_t* out, int64_t ld) {
    for (int64_t r = 0; r < n; r += 2, x += 2 * stride, out += ld) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        const VecUInt pair = two_rows(x + d, r + 1 < n ? x + stride + d : nullptr, dim - d);
        std::memcpy(out + d, &pair, sizeof pair);
      }
    }
  }

  // Rows of A that lie in memory as columns: out(r, k / 2) = (x(k, r), x(k + 1, r)), 0 beyond `depth` up to ld pairs, a
  // multiple of kLanes.
  template <class T>
  static INLINE void rows_of_columns(const T* x, int64_t stride, int64_t rows, int64_t depth, uint32_t* out,
                                     int64_t ld) {
    for (int64_t k = 0; k < 2 * ld; k += 2 * kLanes) {
      for (int64_t r = 0; r < rows; r += kLanes) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const int64_t even = k + 2 * i;
          const T* const p = x + even * stride + r;
          square[i] =
              even >= depth ? Vec{} : bit_cast<Vec>(two_rows(p, even + 1 < depth ? p + stride : nullptr, rows - r));
        }
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if (r + i < rows) std::memcpy(out + (r + i) * ld + k / 2, &square[i], sizeof(Vec));
        }
      }
    }
  }

  // B transposed: out(d / 2, i) = (x(i, d), x(i, d + 1)), 0 for i in [n, ld) and d = dim.
  template <class T>
  static INLINE void columns(const T* x, int64_t stride, int64_t n, int64_t dim, uint32_t* out, int64_t ld) {
    for (int64_t i = 0; i < ld; i += kLanes) {
      for (int64_t d = 0; d < dim; d += 2 * kLanes) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          square[r] = i + r >= n ? Vec{} : bit_cast<Vec>(load_pairs(x + (i + r) * stride + d, dim - d));
        }
        transpose(square);
        const int64_t tall = std::min<int64_t>(kLanes, (dim - d + 1) / 2);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          if (r < tall) std::memcpy(out + (d / 2 + r) * ld + i, &square[r], sizeof(Vec));
        }
      }
    }
  }
};
#endif

// Rows of A, a row every ld.
template <class Math>
struct Rows {
  const typename Math::Element* at;
  int64_t ld;
};

// n rows of A where they lie, if a tile can read them there, else packed into `room`.
template <class Math, class T>
INLINE Rows<Math> rows_of(const T* x, int64_t stride, int64_t n, int64_t dim, typename Math::Element* room,
                          int64_t ld) {
  using Element = typename Math::Element;
  if constexpr (sizeof(Element) == Math::kTerms * sizeof(T)) {
    const bool whole = n % kTileRows == 0 && dim % Math::kTerms == 0 && stride % Math::kTerms == 0;
    if (whole && reinterpret_cast<uintptr_t>(x) % sizeof(Element) == 0)
      return {reinterpret_cast<const Element*>(x), stride / Math::kTerms};
  }
  Pack<Math>::rows(x, stride, n, dim, room, ld);
  return {room, ld};
}

// n rows of B, `wide` numbers each, the sum running over the rows: where they lie, or packed.
template <class Math, class T>
INLINE Rows<Math> pairs_of(const T* x, int64_t stride, int64_t n, int64_t dim, typename Math::Element* room,
                           int64_t wide) {
  if constexpr (std::is_same_v<typename Math::Element, T>) {
    if (dim == wide) return {x, stride};
  }
  Pack<Math>::pairs(x, stride, n, dim, room, wide);
  return {room, wide};
}
