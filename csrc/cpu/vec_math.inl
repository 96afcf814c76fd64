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

// erf(x): x + x * P(x^2) below 0.9277, 1 - exp(-|x| - |x| Q(|x|)) above (minimax, after N. Juffa's published
// single-precision form).
INLINE Vec erf(Vec x) {
  Vec t = abs(x);
  Vec s = x * x;
  Vec q = fma(splat(-1.72853470e-5f), t, splat(3.83197126e-4f));
  Vec u = fma(splat(-3.88396438e-3f), t, splat(2.42546219e-2f));
  q = fma(q, s, u);
  q = fma(q, t, splat(-1.06777877e-1f));
  q = fma(q, t, splat(-6.34846687e-1f));
  q = fma(q, t, splat(-1.28717512e-1f));
  q = fma(q, t, -t);
  q = t > 4.0f ? splat(-104.0f) : q;  // erf is 1 from 3.92 on; also keeps inf * 0 out
  Vec large = copysign(1.0f - exp(q), x);
  Vec p = splat(-5.96761703e-4f);
  p = fma(p, s, splat(4.99119423e-3f));
  p = fma(p, s, splat(-2.67681349e-2f));
  p = fma(p, s, splat(1.12819925e-1f));
  p = fma(p, s, splat(-3.76125336e-1f));
  p = fma(p, s, splat(1.28379166e-1f));
  Vec small = fma(p, x, x);
  Vec result = t > 0.927734375f ? large : small;
  return x == x ? result : x;
}
