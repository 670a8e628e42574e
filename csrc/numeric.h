#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define MMRM_HOST_DEVICE __host__ __device__
#else
#define MMRM_HOST_DEVICE
#endif

// What a clone (below) calls must be inlined into it, lambdas too, to be compiled for the clone's CPU.
#ifdef __GNUC__
#define MMRM_ALWAYS_INLINE __attribute__((always_inline))
#else
#define MMRM_ALWAYS_INLINE
#endif
#define MMRM_INLINE MMRM_ALWAYS_INLINE inline

// Compiles a function for each generation of x86-64; the loader picks the one that this CPU runs. All give the same
// bits: nothing is reassociated or contracted, and a fused multiply-add is written as one. Tests compile without.
#ifndef MMRM_CLONES
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(__CUDACC__)
#define MMRM_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MMRM_CLONES
#endif
#endif

namespace mmrm {

// Storage of torch.bfloat16 and torch.float16; there is no arithmetic in them.
struct bf16_t {
  uint16_t bits;
};
struct fp16_t {
  uint16_t bits;
};

// What values of a type are multiplied and summed in.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

MMRM_HOST_DEVICE MMRM_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

MMRM_HOST_DEVICE MMRM_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MMRM_HOST_DEVICE MMRM_INLINE float widen(bf16_t x) { return float_of_bits(uint32_t(x.bits) << 16); }

// Without branches, so that it vectorises: the product moves the exponent and makes subnormals normal.
MMRM_HOST_DEVICE MMRM_INLINE float widen(fp16_t x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
  return float_of_bits(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite));
}

// To nearest, ties to even; every NaN becomes a quiet one.
MMRM_HOST_DEVICE MMRM_INLINE void narrow(float x, bf16_t& out) {
  const uint32_t bits = bits_of_float(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

MMRM_HOST_DEVICE MMRM_INLINE void narrow(float x, fp16_t& out) {
  const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  // Past 65504 the carry of the rounding gives infinity. The addition of 1/2 rounds subnormals to multiples of 2^-24.
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
  uint32_t rounded = magnitude < 0x38800000 ? subnormal : normal;
  rounded = magnitude >= 0x47800000 ? 0x7c00 : rounded;
  rounded = magnitude > 0x7f800000 ? 0x7e00 : rounded;
  out.bits = uint16_t(sign | rounded);
}

// Between storage and arithmetic.
template <typename To, typename From>
MMRM_HOST_DEVICE MMRM_INLINE To convert(From x) {
  if constexpr (std::is_arithmetic_v<To> && std::is_arithmetic_v<From>) {
    return To(x);
  } else if constexpr (std::is_arithmetic_v<To>) {
    return To(widen(x));
  } else {
    To out;
    narrow(float(x), out);
    return out;
  }
}

}  // namespace mmrm
