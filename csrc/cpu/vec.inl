// A vector of kLanes floats on the compiler's vector extensions: +, -, *, / and comparisons come from the compiler, the
// rest stands here. Only what the compiler does badly is written with intrinsics.

constexpr int kLanes = FASTGPT_LANES;

typedef float Vec __attribute__((vector_size(4 * FASTGPT_LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * FASTGPT_LANES)));
typedef uint32_t VecUInt __attribute__((vector_size(4 * FASTGPT_LANES)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * FASTGPT_LANES)));

#define INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

INLINE Vec splat(float x) { return x - Vec{}; }

// ---- scalars

INLINE float to_float(float x) { return x; }
INLINE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

template <class T>
INLINE T from_float(float x);

template <>
INLINE float from_float<float>(float x) {
  return x;
}

template <>
INLINE BFloat16 from_float<BFloat16>(float x) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// ---- whole vectors

INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Widening and narrowing by intrinsics: g++ 12 makes three shuffles of __builtin_convertvector.
INLINE VecUInt widen(VecHalf half) {
#if FASTGPT_LANES == 16
  return (VecUInt)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);  // the unmasked form warns falsely in g++ 12
#elif FASTGPT_LANES == 8
  return (VecUInt)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, VecUInt);
#endif
}

// The low halves of the lanes; they hold what fits into 16 bits.
INLINE VecHalf narrow(VecUInt v) {
#if FASTGPT_LANES == 16
  return (VecHalf)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#elif FASTGPT_LANES == 8
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // within 128-bit halves
  return (VecHalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, VecHalf);
#endif
}

INLINE Vec load(const BFloat16* p) {
  VecHalf half;
  std::memcpy(&half, p, sizeof half);
  return bit_cast<Vec>(widen(half) << 16);
}

INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

#if defined(FASTGPT_BF16_DOT)
INLINE VecHalf to_bfloat16(Vec v) { return bit_cast<VecHalf>(_mm512_cvtneps_pbh((__m512)v)); }  // subnormals become 0
#else
INLINE VecHalf to_bfloat16(Vec v) {
  VecUInt bits = bit_cast<VecUInt>(v);
  VecUInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  VecUInt nan = (bits >> 16) | 0x40;
  return narrow(v == v ? rounded : nan);
}
#endif

INLINE void store(BFloat16* p, Vec v) {
  VecHalf half = to_bfloat16(v);
  std::memcpy(p, &half, sizeof half);
}

// ---- past the caches, to addresses aligned to a whole vector; fence() before another thread reads

template <class T>
INLINE bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(T)) == 0;
}

#if FASTGPT_LANES == 16
INLINE void store_past(float* p, Vec v) { _mm512_stream_ps(p, (__m512)v); }
INLINE void store_past(BFloat16* p, Vec v) { _mm256_stream_si256((__m256i*)p, (__m256i)to_bfloat16(v)); }
INLINE void fence() { _mm_sfence(); }
#elif FASTGPT_LANES == 8
INLINE void store_past(float* p, Vec v) { _mm256_stream_ps(p, (__m256)v); }
INLINE void store_past(BFloat16* p, Vec v) { _mm_stream_si128((__m128i*)p, (__m128i)to_bfloat16(v)); }
INLINE void fence() { _mm_sfence(); }
#else
INLINE void store_past(float* p, Vec v) { store(p, v); }
INLINE void store_past(BFloat16* p, Vec v) { store(p, v); }
INLINE void fence() {}
#endif

// ---- the first n lanes (0 <= n <= kLanes); loads fill the others, stores leave their memory alone

#if FASTGPT_LANES == 16
INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

INLINE Vec load_n(const float* p, int n, float fill = 0.0f) {
  return (Vec)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p);
}
INLINE void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
#elif FASTGPT_LANES == 8
INLINE VecInt first_lanes(int n) { return VecInt{0, 1, 2, 3, 4, 5, 6, 7} < n; }

INLINE Vec load_n(const float* p, int n, float fill = 0.0f) {
  VecInt mask = first_lanes(n);
  Vec v = (Vec)_mm256_maskload_ps(p, (__m256i)mask);
  return mask ? v : splat(fill);
}
INLINE void store_n(float* p, Vec v, int n) { _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v); }
#else
INLINE Vec load_n(const float* p, int n, float fill = 0.0f) {
  Vec v = splat(fill);
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
INLINE void store_n(float* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#endif

#if FASTGPT_LANES == 16
INLINE Vec load_n(const BFloat16* p, int n, float fill = 0.0f) {
  const VecHalf half = (VecHalf)_mm256_maskz_loadu_epi16(first_lanes(n), p);
  const Vec v = bit_cast<Vec>(widen(half) << 16);
  return (Vec)_mm512_mask_blend_ps(first_lanes(n), _mm512_set1_ps(fill), (__m512)v);
}

INLINE void store_n(BFloat16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)to_bfloat16(v)); }
#else
INLINE Vec load_n(const BFloat16* p, int n, float fill = 0.0f) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}

INLINE void store_n(BFloat16* p, Vec v, int n) {
  VecHalf half = to_bfloat16(v);
  std::memcpy(p, &half, n * sizeof(BFloat16));
}
#endif

// ---- the next min(n, kLanes) elements of a row

// Lanes beyond are zero; a full vector takes the short way.
template <class T>
INLINE Vec load_part(const T* p, int n) {
  return n >= kLanes ? load(p) : load_n(p, n);
}

template <class T>
INLINE void store_part(T* p, Vec v, int n) {
  n >= kLanes ? store(p, v) : store_n(p, v, n);
}

// ---- arithmetic

// NaN in b is kept, NaN in a is not: put the accumulator first where a NaN must be dropped, second where it must stay.
#if FASTGPT_LANES == 16
INLINE Vec max(Vec a, Vec b) { return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
INLINE Vec min(Vec a, Vec b) { return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif FASTGPT_LANES == 8
INLINE Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

// Contraction is off (-ffp-contract=off), so that a loop gives the same bits wherever the compiler puts it.
#if FASTGPT_LANES == 16
INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif FASTGPT_LANES == 8
INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

INLINE Vec abs(Vec a) { return bit_cast<Vec>(bit_cast<VecUInt>(a) & 0x7fffffffu); }

INLINE Vec copysign(Vec magnitude, Vec sign) {
  return bit_cast<Vec>((bit_cast<VecUInt>(magnitude) & 0x7fffffffu) | (bit_cast<VecUInt>(sign) & 0x80000000u));
}

// Across the lanes, by halves.
template <class Combine>
INLINE float reduce(Vec v, const Combine& combine) {
#if FASTGPT_LANES == 16
  auto eight = combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                       __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#elif FASTGPT_LANES == 8
  auto eight = v;
#endif
#if FASTGPT_LANES >= 8
  auto four =
      combine(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
#else
  auto four = v;
#endif
  auto two = combine(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
  return combine(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
}

INLINE float sum(Vec v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

INLINE float max(Vec v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}
