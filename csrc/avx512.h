#pragma once

// Products of small matrices and exponentials in AVX-512. Include before any other header of this package, on x86-64
// with GCC; what is defined between these pragmas must run only where the CPU has the instructions.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "numeric.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace mmrm {

constexpr int kVector = 16;  // floats, or words, of a vector

// A word of 32 bits is what one step of a product multiplies: one float, or two bf16 that lie one after another.
template <typename T>
struct Word;

template <>
struct Word<float> {
  static constexpr int kValues = 1;
  static MMRM_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

template <>
struct Word<bf16_t> {
  static constexpr int kValues = 2;
  static MMRM_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
  }
};

// A matrix of words whose rows are read one word at a time.
struct Left {
  const uint32_t* words;
  int64_t row, step;  // strides in words
};

// A matrix of words, [steps, columns].
struct Right {
  const uint32_t* words;
  int64_t step;  // stride in words
};

// out[M, 16 NV] (+)= left[M, steps] * right[steps, 16 NV], in registers.
template <typename T, int M, int NV, bool add>
MMRM_INLINE void multiply_block(const Left& left, const Right& right, int64_t steps, float* out, int64_t out_row) {
  __m512 sums[M][NV];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sums[m][n] = _mm512_setzero_ps();
  }
  for (int64_t step = 0; step < steps; ++step) {
    __m512i b[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) b[n] = _mm512_loadu_si512(right.words + step * right.step + n * kVector);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int word;
      std::memcpy(&word, left.words + m * left.row + step * left.step, sizeof(word));
      const __m512i a = _mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sums[m][n] = Word<T>::dot(sums[m][n], a, b[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      float* place = out + m * out_row + n * kVector;
      _mm512_storeu_ps(place, add ? _mm512_add_ps(_mm512_loadu_ps(place), sums[m][n]) : sums[m][n]);
    }
  }
}

// out[rows, 16 NV] (+)= left[rows, steps] * right[steps, 16 NV]; up to M - 1 rows more are read and written.
template <typename T, int M, int NV, bool add>
MMRM_INLINE void multiply(Left left, const Right& right, int64_t rows, int64_t steps, float* out, int64_t out_row) {
  for (int64_t m = 0; m < rows; m += M) {
    multiply_block<T, M, NV, add>({left.words + m * left.row, left.row, left.step}, right, steps, out + m * out_row,
                                  out_row);
  }
}

// 2^x for x <= 0, within 2 units in the last place; 0 below 2^-126, for -infinity too; NaN for NaN, which a maximum
// keeps as its second operand.
MMRM_INLINE __m512 exp2_negative(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);  // exact, |r| <= 1/2
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);  // Cephes' exp2f
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887440266574e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357674640e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471162809e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791363012e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028550421e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// The bf16 of 16 floats, each in its own word's lower half.
MMRM_INLINE __m512i narrow_words(__m512 x) { return _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(x))); }

// Stores 16 values.
MMRM_INLINE void store(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
MMRM_INLINE void store(bf16_t* out, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), __m256i(_mm512_cvtneps_pbh(x)));
}

// Stores steps `a` and `b`, which follow one another, as words [2 / kValues, columns].
MMRM_INLINE void store_steps(float* out, int64_t columns, __m512 a, __m512 b) {
  _mm512_storeu_ps(out, a);
  _mm512_storeu_ps(out + columns, b);
}
MMRM_INLINE void store_steps(bf16_t* out, int64_t, __m512 a, __m512 b) {
  _mm512_storeu_si512(out, _mm512_or_si512(narrow_words(a), _mm512_slli_epi32(narrow_words(b), 16)));
}

}  // namespace mmrm

#pragma GCC pop_options
