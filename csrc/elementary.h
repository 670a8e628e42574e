#pragma once

#include <cmath>

#include "numeric.h"

namespace mmrm {

// exp(x) for x <= 0 and log(1 + x) for 0 <= x <= 1. float without branches or calls, so that loops over arrays vectorise:
// within 1.5 units in the last place (tests/ops/test_elementary.py); NaN stays NaN. double is the library's.

MMRM_HOST_DEVICE MMRM_INLINE double exp_negative(double x) { return std::exp(x); }

MMRM_HOST_DEVICE MMRM_INLINE double log1p_fraction(double x) { return std::log1p(x); }

// x = n log(2) + r, |r| <= log(2) / 2; the polynomial is Cephes' expf.
MMRM_HOST_DEVICE MMRM_INLINE float exp_negative(float x) {
  constexpr float kToInteger = 0x1.8p23f;  // added, it leaves the nearest integer in the lowest bits
  x = x < -104.0f ? -104.0f : x;           // exp(-104) rounds to 0
  const float shifted = x * 0x1.715476p0f + kToInteger, n = shifted - kToInteger;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  // By 2^n in two steps: results below 2^-126 are rounded once.
  const int32_t exponent = int32_t(bits_of_float(shifted) - bits_of_float(kToInteger)), half = exponent >> 1;
  return p * float_of_bits(uint32_t(half + 127) << 23) * float_of_bits(uint32_t(exponent - half + 127) << 23);
}

// log(1 + x) = 2 artanh(s) = 2 s + s R(s^2), s = x / (2 + x), without the rounding of 2 s. The polynomial R interpolates
// at Chebyshev nodes.
MMRM_HOST_DEVICE MMRM_INLINE float log1p_fraction(float x) {
  const float s = x / (2.0f + x), w = s * s;
  float p = 0.23224328458309174f;
  p = p * w + 0.2170657515525818f;
  p = p * w + 0.285923570394516f;
  p = p * w + 0.3999970555305481f;
  p = p * w + 0.6666666865348816f;
  const float half_square = 0.5f * x * x;
  return x - (half_square - s * (half_square + w * p));
}

}  // namespace mmrm
