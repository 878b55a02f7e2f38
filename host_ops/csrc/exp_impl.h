// exp of a vector of floats, for the softmax: arguments are at most 0, or NaN.
//
// Cody-Waite reduction x = n ln2 + r with |r| <= ln2 / 2, the degree-6 polynomial of Cephes' expf
// and a scaling by 2^n; relative error below 2e-7. Below -87 the result is 0, which spares the
// subnormal range. Expects round_of, pow2_of, zero_below of the instruction set.

inline Vec exp_of(Vec x) {
  const Vec n = round_of(mul(x, set1(1.44269504088896341f)));
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec y = set1(1.9875691500e-4f);
  y = fma(y, r, set1(1.3981999507e-3f));
  y = fma(y, r, set1(8.3334519073e-3f));
  y = fma(y, r, set1(4.1665795894e-2f));
  y = fma(y, r, set1(1.6666665459e-1f));
  y = fma(y, r, set1(5.0000001201e-1f));
  y = add(fma(y, mul(r, r), r), set1(1.0f));
  return zero_below(mul(y, pow2_of(n)), x, -87.0f);
}
