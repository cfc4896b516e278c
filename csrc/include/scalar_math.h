// Scalar elementary functions, torch-free, written so that a plain loop over them vectorises.
//
// float: branch-free, within 2 ulp of the exact value (atan: 3; tests/csrc measures it) over the whole range, NaN in,
// NaN out. double: the C library. Shared by every kernel; libm's float functions would be calls in a CPU's loop. On a
// GPU exp and log are CUDA's own (full accuracy): the hardware's exponential is cheaper than a polynomial.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Inlining is not a hint here: a call in the loop would keep it scalar.
#ifndef NF_FN
#ifdef __CUDACC__
#define NF_FN static __host__ __device__ __forceinline__
#else
#define NF_FN static inline __attribute__((always_inline))
#endif
#endif

namespace nf {
namespace {

NF_FN float from_bits(int32_t i) {
  float f;
  std::memcpy(&f, &i, sizeof f);
  return f;
}

NF_FN int32_t to_bits(float f) {
  int32_t i;
  std::memcpy(&i, &f, sizeof i);
  return i;
}

#ifdef __CUDA_ARCH__
NF_FN float exp_(float x) { return ::expf(x); }
NF_FN float exp_bounded(float x) { return ::expf(x); }
NF_FN float exp_minus_abs(float x) { return ::expf(-::fabsf(x)); }
NF_FN float log_(float x) { return ::logf(x); }
#else
// exp(x) as p 2^k. Contraction to a fused multiply-add is left to the compiler.
NF_FN float exp_split(float x, int32_t& k) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const float t = x * 1.44269504088896341f + magic;
  const float n = t - magic;
  k = to_bits(t) - 0x4b400000;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

// exp for x in [-104, 89] or NaN.
NF_FN float exp_bounded(float x) {
  int32_t k;
  const float p = exp_split(x, k);
  // 2^k in two factors, so that denormal results and the overflow to infinity come out right. (k of a NaN is any
  // number; p is NaN then. The sums wrap as unsigned numbers do.)
  const int32_t half = k >> 1;
  const uint32_t low = static_cast<uint32_t>(half) + 127u, high = static_cast<uint32_t>(k - half) + 127u;
  return p * from_bits(static_cast<int32_t>(low << 23)) * from_bits(static_cast<int32_t>(high << 23));
}

// exp for x in [-87, 88] or NaN.
NF_FN float exp_normal(float x) {
  int32_t k;
  const float p = exp_split(x, k);
  return p * from_bits(static_cast<int32_t>((static_cast<uint32_t>(k) + 127u) << 23));
}

// The bounds are where the result is infinite or zero already; comparisons keep NaN.
NF_FN float exp_(float x) {
  x = x > 89.0f ? 89.0f : x;
  return exp_bounded(x < -104.0f ? -104.0f : x);
}

// exp(-|x|), what sigmoid, softplus and tanh are made of: one bound is enough.
NF_FN float exp_minus_abs(float x) {
  const float a = std::fabs(x);
  return exp_bounded(-(a > 104.0f ? 104.0f : a));
}

// log for x >= 0, denormals included; 0 gives -inf, negative and NaN give NaN.
NF_FN float log_(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const float scaled = tiny ? x * 8388608.0f : x;
  const int32_t bits = to_bits(scaled);
  // m in [sqrt(1/2), sqrt(2)), x = m 2^e
  const int32_t shifted = static_cast<int32_t>(static_cast<uint32_t>(bits) - 0x3f3504f3u);  // wraps for x < 0
  const int32_t e_int = (shifted >> 23) - (tiny ? 23 : 0);
  const float m = from_bits((shifted & 0x007fffff) + 0x3f3504f3);
  const float e = static_cast<float>(e_int);
  const float f = m - 1.0f;
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float y = p * f * z;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  float r = f + y;
  r = r + e * 0.693359375f;
  r = x == 0.0f ? -INFINITY : r;
  r = x < 0.0f ? NAN : r;
  return (x != x || x == INFINITY) ? x : r;
}
#endif

// log(1 + u) for u in [0, 1] as u P(u): every digit of a small u is kept, and there is no division to wait for.
NF_FN float log1p_unit(float u) {
  float p = 0.001986696594f;
  p = p * u - 0.01318782657f;
  p = p * u + 0.04100657369f;
  p = p * u - 0.08188040924f;
  p = p * u + 0.1237799587f;
  p = p * u - 0.1608762301f;
  p = p * u + 0.1988582029f;
  p = p * u - 0.2498649646f;
  p = p * u + 0.3333249754f;
  p = p * u - 0.4999997949f;
  p = p * u + 0.9999999992f;
  return p * u;
}

NF_FN float tanh_(float x) {
  const float a = std::fabs(x);
  const float u = exp_minus_abs(2.0f * a);
  const float far = (1.0f - u) / (1.0f + u);
  const float z = a * a;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * a + a;
  const float r = a < 0.625f ? near : far;
  return x < 0.0f ? -r : r;
}

NF_FN float atan_(float x) {
  const float a = std::fabs(x);
  const bool big = a > 2.414213562373095f;
  const bool mid = a > 0.4142135623730950f;
  const float t = big ? -1.0f / a : (mid ? (a - 1.0f) / (a + 1.0f) : a);
  const float base = big ? 1.5707963267948966f : (mid ? 0.7853981633974483f : 0.0f);
  const float z = t * t;
  float p = 8.05374449538e-2f;
  p = p * z - 1.38776856032e-1f;
  p = p * z + 1.99777106478e-1f;
  p = p * z - 3.33329491539e-1f;
  const float r = base + (p * z * t + t);
  return x < 0.0f ? -r : r;
}

// 1 / d for d in [1, 2]. On a GPU a division is a branch with a call behind it; this is two multiply-adds.
NF_FN float reciprocal_1_2(float d) {
#ifdef __CUDA_ARCH__
  const float r = __fdividef(1.0f, d);
  return fmaf(r, fmaf(-d, r, 1.0f), r);
#else
  return 1.0f / d;
#endif
}

NF_FN double reciprocal_1_2(double d) { return 1.0 / d; }
NF_FN double exp_(double x) { return std::exp(x); }
NF_FN double exp_minus_abs(double x) { return std::exp(-std::fabs(x)); }
NF_FN double log_(double x) { return std::log(x); }
NF_FN double log1p_unit(double u) { return std::log1p(u); }
NF_FN double tanh_(double x) { return std::tanh(x); }
NF_FN double atan_(double x) { return std::atan(x); }

}  // namespace
}  // namespace nf
