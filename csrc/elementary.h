#pragma once

#include <cmath>

#include "numeric.h"

namespace mmrm {

// exp(x) for x <= 0 and log(1 + x) for 0 <= x <= 1. float without branches, and without calls where the CPU has fused
// multiply-adds, so that loops over arrays vectorise: within 1.2 units in the last place, and 0 for an exponential below
// 2^-126 (tests/ops/test_elementary.py); NaN stays NaN. double is the library's.

MMRM_HOST_DEVICE MMRM_INLINE double exp_negative(double x) { return std::exp(x); }

MMRM_HOST_DEVICE MMRM_INLINE double log1p_fraction(double x) { return std::log1p(x); }

// x = n log(2) + r, |r| <= log(2) / 2; the polynomial is Cephes' expf.
MMRM_HOST_DEVICE MMRM_INLINE float exp_negative(float x) {
  constexpr float kToInteger = 0x1.8p23f;  // added, it leaves the nearest integer in the lowest bits
  const float shifted = std::fma(x, 0x1.715476p0f, kToInteger), n = shifted - kToInteger;
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r) + 1.0f;
  const float scaled = float_of_bits(bits_of_float(p) + (bits_of_float(shifted) << 23));  // by 2^n
  return x >= -87.0f ? scaled : x < 0.0f ? 0.0f : x;
}

// log(1 + x) = 2 artanh(s) = 2 s + s R(s^2), s = x / (2 + x), without the rounding of 2 s. The polynomial R interpolates
// at Chebyshev nodes.
MMRM_HOST_DEVICE MMRM_INLINE float log1p_fraction(float x) {
  const float s = x / (2.0f + x), w = s * s;
  float p = 0.23224328458309174f;
  p = std::fma(p, w, 0.2170657515525818f);
  p = std::fma(p, w, 0.285923570394516f);
  p = std::fma(p, w, 0.3999970555305481f);
  p = std::fma(p, w, 0.6666666865348816f);
  const float half_square = 0.5f * x * x;
  return x - (half_square - s * std::fma(w, p, half_square));
}

}  // namespace mmrm
