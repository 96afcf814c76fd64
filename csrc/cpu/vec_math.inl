// exp, tanh, erf and the functions made of them, on Vec; each within two units in the last place of the true value.

// exp(x) = 2^n * exp(r), r = x - n ln 2 in [-ln2/2, ln2/2] by Cody and Waite's two-part ln 2; the polynomial is Cephes'
// expf (S. Moshier). Overflows to inf, underflows through the subnormals to 0, keeps NaN.
INLINE Vec exp(Vec x) {
  x = x > 89.0f ? splat(89.0f) : x;      // exp(89) is inf already
  x = x < -104.0f ? splat(-104.0f) : x;  // exp(-104) rounds to 0
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
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
  p = fma(p, r * r, r) + 1.0f;
#if FASTGPT_LANES == 16
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);  // the unmasked form warns falsely in g++ 12
#else
  // 2^n in two factors: n reaches -150 and 128, outside what one exponent field holds.
  VecInt whole = bit_cast<VecInt>(shifted) - bit_cast<VecInt>(magic);
  VecInt half = whole >> 1;
  Vec first = bit_cast<Vec>((half + 127) << 23);
  Vec second = bit_cast<Vec>((whole - half + 127) << 23);
  return p * first * second;
#endif
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
