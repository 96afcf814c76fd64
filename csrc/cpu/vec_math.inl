// exp, tanh, erf and the functions made of them, on Vec; each within two units in the last place of the true value.

// p * 2^n; `shifted` is n + 1.5 * 2^23. n reaches -150 and 128.
INLINE Vec times_power_of_two(Vec p, [[maybe_unused]] Vec n, [[maybe_unused]] Vec shifted) {
#if FASTGPT_LANES == 16
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);  // the unmasked form warns falsely in g++ 12
#else
  // In two factors: one exponent field does not hold n.
  VecInt whole = bit_cast<VecInt>(shifted) - bit_cast<VecInt>(splat(12582912.0f));
  VecInt half = whole >> 1;
  Vec first = bit_cast<Vec>((half + 127) << 23);
  Vec second = bit_cast<Vec>((whole - half + 127) << 23);
  return p * first * second;
#endif
}

// exp(x) = 2^n * exp(r), r = x - n ln 2 in [-ln2/2, ln2/2] by Cody and Waite's two-part ln 2; the polynomial is Cephes'
// expf (S. Moshier). Overflows to inf, underflows through the subnormals to 0, keeps NaN.
INLINE Vec exp(Vec x) {
  x = max(splat(-104.0f), min(splat(89.0f), x));  // exp(89) is inf already, exp(-104) rounds to 0; a NaN stays
  const Vec magic = splat(12582912.0f);           // 1.5 * 2^23: adding it rounds to an integer
  Vec shifted = fma(x, splat(1.44269504088896341f), magic);
  Vec n = shifted - magic;
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(fma(p, r, splat(1.0f)), r, splat(1.0f));
  return times_power_of_two(p, n, shifted);
}

// exp(x) to 12 bits, for results that are rounded to bf16's 8: a polynomial of degree 4 and ln 2 in one part.
INLINE Vec exp_half(Vec x) {
  x = max(splat(-104.0f), min(splat(89.0f), x));
  const Vec magic = splat(12582912.0f);
  const Vec shifted = fma(x, splat(1.44269504088896341f), magic);
  const Vec n = shifted - magic;
  const Vec r = fma(n, splat(-0.693147180559945309f), x);
  Vec p = splat(0.04145836923f);
  p = fma(p, r, splat(0.1679090591f));
  p = fma(p, r, splat(0.500043615f));
  p = fma(p, r, splat(0.999963406f));
  p = fma(p, r, splat(0.999999261f));
  return times_power_of_two(p, n, shifted);
}

constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x from -inf to 127, within 7e-8 relative, or within 3e-6 (kShort) where the result is rounded to bf16; below
// 2^-126 it may be 0. x = n + r with r in [0, 1]; minimax polynomials of 2^r that are 1 at 0.
template <bool kShort>
INLINE Vec exp2(Vec x) {
#if FASTGPT_LANES == 16
  const Vec r = (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF);  // x - floor(x); 0 for -inf
#else
  const Vec given = x;
  x = max(splat(-126.0f), x);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = (x - 0.5f) + magic;
  const Vec r = x - (shifted - magic);
#endif
  Vec p;
  if constexpr (kShort) {
    p = splat(1.342668384e-2f);
    p = fma(p, r, splat(5.224247277e-2f));
    p = fma(p, r, splat(2.412801981e-1f));
    p = fma(p, r, splat(6.930448413e-1f));
  } else {
    p = splat(2.161291486e-4f);
    p = fma(p, r, splat(1.246784697e-3f));
    p = fma(p, r, splat(9.675451554e-3f));
    p = fma(p, r, splat(5.548528209e-2f));
    p = fma(p, r, splat(2.402293086e-1f));
    p = fma(p, r, splat(6.931470633e-1f));
  }
  p = fma(p, r, splat(1.0f));
#if FASTGPT_LANES == 16
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p,
                                     (__m512)x);  // p * 2^floor(x); the unmasked form warns falsely in g++ 12
#else
  const VecInt n = bit_cast<VecInt>(shifted) - bit_cast<VecInt>(magic);
  const Vec result = p * bit_cast<Vec>((n + 127) << 23);
  return given < -126.0f ? Vec{} : result;
#endif
}

// exp and division to the precision of results of type T.
template <class T>
INLINE Vec exp_to(Vec x) {
  return sizeof(T) == 2 ? exp_half(x) : exp(x);
}

template <class T>
INLINE Vec quotient_to(Vec a, Vec b) {
#if FASTGPT_LANES == 16
  if constexpr (sizeof(T) == 2) return a * (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)b);  // within 2^-14
#endif
  return a / b;
}

INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// Cephes' tanhf: an odd polynomial below 0.625, 1 - 2 / (exp(2x) + 1) above.
INLINE Vec tanh(Vec x) {
  Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  Vec small = fma(p * z, x, x);
  Vec magnitude = abs(x);
  Vec large = copysign(1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f), x);
  Vec result = magnitude < 0.625f ? small : large;
  return x == x ? result : x;
}

// erf(x) = x P(u), u = x^2 / h - 1 in [-1, 1], for |x| <= 3.92 (h = 3.92^2 / 2), and +-1 beyond, where it is 1 in fp32.
// P is the Chebyshev interpolant of erf(x) / x of degree 15 in the variable u, in powers of u: |u| <= 1 keeps Horner's
// rule stable, which powers of x^2 up to 15 would not be. Relative error at most 2.3e-7 everywhere, no division, no
// exp: a third faster than two branches.
INLINE Vec erf(Vec x) {
  constexpr float kBeyond = 3.92f;
  const Vec u = min(splat(2.0f), x * x * (2.0f / (kBeyond * kBeyond))) - 1.0f;
  Vec p = splat(-0.000939271937f);
  p = fma(p, u, splat(0.00212785811f));
  p = fma(p, u, splat(-0.00104527804f));
  p = fma(p, u, splat(0.00182033039f));
  p = fma(p, u, splat(-0.00817048363f));
  p = fma(p, u, splat(0.014343502f));
  p = fma(p, u, splat(-0.0196174905f));
  p = fma(p, u, splat(0.0296092127f));
  p = fma(p, u, splat(-0.0435857326f));
  p = fma(p, u, splat(0.0584258288f));
  p = fma(p, u, splat(-0.0739898905f));
  p = fma(p, u, splat(0.090592213f));
  p = fma(p, u, splat(-0.109181851f));
  p = fma(p, u, splat(0.134084836f));
  p = fma(p, u, splat(-0.180108562f));
  p = fma(p, u, splat(0.360736817f));
  return abs(x) > kBeyond ? copysign(splat(1.0f), x) : p * x;
}

#if FASTGPT_LANES == 16
// Functions by table: sixteen cells of one width, a polynomial in each, its coefficients picked by a shuffle of one
// register. Cell i is centred at i / per_unit; u in [-1/2, 1/2] is the place in it. Coefficients: least squares on
// Chebyshev nodes, reweighted towards the smallest greatest relative error.
struct Cell {
  __m512i index;  // in the low four bits
  Vec u;
};

INLINE Cell cell_of(Vec magnitude, float per_unit) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(magnitude, splat(per_unit), magic);
  return {(__m512i)shifted, fma(magnitude, splat(per_unit), magic - shifted)};
}

INLINE Vec coefficient(const float (&table)[16], const Cell& cell) {
  return (Vec)_mm512_maskz_permutexvar_ps(0xffff, cell.index, _mm512_load_ps(table));
}

// Phi(-x) for 0 <= x <= kNormalEnd, in cells of 3/8: relative error 5e-6 in the last cell, 1e-7 where it counts.
alignas(64) constexpr float kNormalTail[7][16] = {
    {0.5f, 0.353830248f, 0.22662735f, 0.130294517f, 0.066807203f, 0.0303963609f, 0.0122244731f, 0.00433244836f,
     0.00134989806f, 0.000369078451f, 8.84172914e-05f, 1.85367389e-05f, 3.39767394e-06f, 5.44042564e-07f,
     7.60496945e-08f, 9.27541866e-09f},
    {-0.149603352f, -0.139445662f, -0.112926535f, -0.079453744f, -0.0485690981f, -0.0257948544f, -0.0119023686f,
     -0.00477156788f, -0.00166194304f, -0.000502919604f, -0.000132223431f, -3.02026983e-05f, -5.99391615e-06f,
     -1.0334827e-06f, -1.54818764e-07f, -2.01498498e-08f},
    {1.61660119e-09f, 0.00980477314f, 0.0158802923f, 0.0167597719f, 0.0136600574f, 0.00906850304f, 0.00502131321f,
     0.00234850729f, 0.000934843381f, 0.000318253704f, 9.29693633e-05f, 2.33597348e-05f, 5.05728894e-06f,
     9.44640249e-07f, 1.52391976e-07f, 2.12500346e-08f},
    {0.00350626139f, 0.00280862139f, 0.00115795713f, -0.000494599226f, -0.00142289163f, -0.00152086257f,
     -0.00113329652f, -0.000658782257f, -0.000311618933f, -0.000122475787f, -4.04789462e-05f, -1.13359765e-05f,
     -2.70379519e-06f, -5.51270318e-07f, -9.63403224e-08f, -1.44610981e-08f},
    {-1.72408292e-08f, -0.00032854153f, -0.000453592045f, -0.000340611849f, -0.000120046403f, 5.47914206e-05f,
     0.000121351062f, 0.000107065687f, 6.57278724e-05f, 3.12943303e-05f, 1.20546156e-05f, 3.83824317e-06f,
     1.02302761e-06f, 2.30125224e-07f, 4.39350991e-08f, 7.14831616e-09f},
    {-7.34227797e-05f, -4.97044784e-05f, 9.36157107e-07f, 3.87964792e-05f, 4.32692541e-05f, 2.43667164e-05f,
     3.54249642e-06f, -7.08322023e-06f, -8.17858199e-06f, -5.34079345e-06f, -2.54907582e-06f, -9.57158136e-07f,
     -2.92198195e-07f, -7.38389332e-08f, -1.56188449e-08f, -2.78621637e-09f},
    {4.59708787e-08f, 7.29717976e-06f, 8.36765321e-06f, 3.56138298e-06f, -1.84312364e-06f, -3.85341809e-06f,
     -2.71691238e-06f, -8.05905586e-07f, 3.1199815e-07f, 5.33945808e-07f, 3.62497502e-07f, 1.68890011e-07f,
     6.02957897e-08f, 1.72381878e-08f, 4.03794687e-09f, 7.8571788e-10f},
};
constexpr float kNormalPerUnit = 8.0f / 3.0f, kNormalEnd = 5.8f;  // cell 15 ends a little later

// Phi(-|x|) and the density at x; both 0 beyond kNormalEnd, where the first is below 4e-9.
INLINE std::pair<Vec, Vec> normal_tail_and_density(Vec x) {
  const Vec magnitude = abs(x);
  const Cell cell = cell_of(magnitude, kNormalPerUnit);
  Vec p = coefficient(kNormalTail[6], cell), slope = {};
#pragma GCC unroll 6
  for (int k = 5; k >= 0; --k) {
    slope = fma(slope, cell.u, p);
    p = fma(p, cell.u, coefficient(kNormalTail[k], cell));
  }
  return {magnitude <= kNormalEnd ? p : Vec{}, magnitude <= kNormalEnd ? -kNormalPerUnit * slope : Vec{}};
}

// tanh(x) / x for 0 <= x < 3.875, in cells of 1/4, to 2^-17.
alignas(64) constexpr float kTanhRatio[4][16] = {
    {0.999995947f, 0.979671955f, 0.924234211f, 0.846866727f, 0.761595786f, 0.678628087f, 0.603432775f, 0.537929177f,
     0.482013851f, 0.434678257f, 0.394645661f, 0.360676199f, 0.331684858f, 0.306768447f, 0.285193652f, 0.266371816f},
    {3.95516953e-16f, -0.0396582037f, -0.0688917786f, -0.083425425f, -0.0854046345f, -0.0796424598f, -0.0704543963f,
     -0.0605882369f, -0.0514204539f, -0.0434681997f, -0.0368053764f, -0.0313147418f, -0.0268182475f, -0.0231363717f,
     -0.0201109163f, -0.0176107977f},
    {-0.0207038596f, -0.0178110879f, -0.0109790973f, -0.00381484907f, 0.00130793662f, 0.00399774406f, 0.00490691746f,
     0.00482042646f, 0.00429688161f, 0.00364963571f, 0.00302637857f, 0.0024832366f, 0.00203211419f, 0.00166627276f,
     0.00137281942f, 0.00113823393f},
    {2.20579873e-15f, 0.00181610556f, 0.00252648257f, 0.00211708876f, 0.00127852813f, 0.000550224271f, 9.676841e-05f,
     -0.000125938444f, -0.000207241072f, -0.00021676645f, -0.00019584407f, -0.000165575126f, -0.000135445909f,
     -0.000109045504f, -8.72327364e-05f, -6.97358773e-05f},
};

// tanh(x) for results in bf16: beyond 3.875 it is 1 there.
INLINE Vec tanh_half(Vec x) {
  const Vec magnitude = abs(x);
  const Cell cell = cell_of(magnitude, 4.0f);
  Vec p = coefficient(kTanhRatio[3], cell);
#pragma GCC unroll 3
  for (int k = 2; k >= 0; --k) p = fma(p, cell.u, coefficient(kTanhRatio[k], cell));
  return magnitude >= 3.875f ? copysign(splat(1.0f), x) : x * p;  // at 3.875 the next cell, 16, would begin
}
#else
INLINE Vec tanh_half(Vec x) { return tanh(x); }
#endif
