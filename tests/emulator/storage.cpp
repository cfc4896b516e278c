// The conversions of cuda_bf16.h and cuda_fp16.h: exact to float, round to nearest even from it.

#include "../../csrc/cuda/device.h"

namespace {

float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

}  // namespace

float __bfloat162float(__nv_bfloat16 v) { return as_float(static_cast<uint32_t>(v.bits) << 16); }

__nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t u = as_bits(v);
  if (v != v) return {0x7fff};  // CUDA's NaN
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}

float __half2float(__half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t exponent = v.bits >> 10 & 0x1fu, mantissa = v.bits & 0x3ffu;
  if (exponent == 0x1f) return as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // m 2^-24
  return as_float(as_bits(magnitude) | sign);
}

__half __float2half_rn(float v) {
  const uint32_t u = as_bits(v) & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(as_bits(v) >> 16 & 0x8000u);
  const auto with_sign = [&](uint32_t bits) { return __half{static_cast<uint16_t>(bits | sign)}; };
  if (v != v) return {0x7fff};                     // CUDA's NaN
  if (u >= 0x477ff000u) return with_sign(0x7c00);  // rounds to 65536 or more
  if (u < 0x38800000u)                             // denormal: the addition rounds
    return with_sign(as_bits(as_float(u) + 0.5f) - 0x3f000000u);
  return with_sign((u + 0xfffu + (u >> 13 & 1u) - 0x38000000u) >> 13);
}
