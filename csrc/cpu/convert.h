// Strided and low-precision elements to and from unit-stride arrays in the arithmetic's type.
#pragma once

#include <cstring>

#include "../include/types.h"

namespace nf {
namespace {

inline float bf16_to_float(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t e = h >> 10 & 0x1fu, m = h & 0x3ffu, u;
  if (e == 0x1f) {
    u = sign | 0x7f800000u | m << 13;
  } else if (e != 0) {
    u = sign | (e + 112) << 23 | m << 13;
  } else {
    const float f = static_cast<float>(m) * 5.9604644775390625e-8f;  // m 2^-24
    std::memcpy(&u, &f, sizeof u);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline uint16_t float_to_f16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  const uint16_t sign = u >> 16 & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00;
  if (u >= 0x477ff000u) return sign | 0x7c00;  // rounds to 65536 or more
  if (u < 0x38800000u) {                       // denormal: let the addition round
    float a;
    std::memcpy(&a, &u, sizeof a);
    a += 0.5f;
    uint32_t v;
    std::memcpy(&v, &a, sizeof v);
    return sign | static_cast<uint16_t>(v - 0x3f000000u);
  }
  u += 0xfffu + (u >> 13 & 1u);
  return sign | static_cast<uint16_t>((u - 0x38000000u) >> 13);
}

template <DType d>
struct Storage;
template <>
struct Storage<DType::f32> {
  using type = float;
  static float load(float v) { return v; }
  static float store(double v) { return static_cast<float>(v); }
};
template <>
struct Storage<DType::f64> {
  using type = double;
  static double load(double v) { return v; }
  static double store(double v) { return v; }
};
template <>
struct Storage<DType::bf16> {
  using type = uint16_t;
  static float load(uint16_t v) { return bf16_to_float(v); }
  static uint16_t store(double v) { return float_to_bf16(static_cast<float>(v)); }
};
template <>
struct Storage<DType::f16> {
  using type = uint16_t;
  static float load(uint16_t v) { return f16_to_float(v); }
  static uint16_t store(double v) { return float_to_f16(static_cast<float>(v)); }
};

// dst[i] = base[offset[i]] and base[offset[i]] = src[i], n elements.
template <typename T>
using Gather = void (*)(const void* base, const int64_t* offset, int n, T* dst);
template <typename T>
using Scatter = void (*)(void* base, const int64_t* offset, int n, const T* src);

template <typename T, DType d>
void gather(const void* base, const int64_t* offset, int n, T* dst) {
  const auto* p = static_cast<const typename Storage<d>::type*>(base);
  for (int i = 0; i < n; ++i) dst[i] = static_cast<T>(Storage<d>::load(p[offset[i]]));
}

template <typename T, DType d>
void scatter(void* base, const int64_t* offset, int n, const T* src) {
  auto* p = static_cast<typename Storage<d>::type*>(base);
  for (int i = 0; i < n; ++i) p[offset[i]] = Storage<d>::store(src[i]);
}

// The same for elements a constant stride apart; strides of 1 and 2 (interleaved pairs) are loops that vectorise.
template <typename T>
using LoadRun = void (*)(const void* base, int64_t stride, int n, T* dst);
template <typename T>
using StoreRun = void (*)(void* base, int64_t stride, int n, const T* src);

template <typename T, DType d>
void load_run(const void* base, int64_t stride, int n, T* dst) {
  const auto* p = static_cast<const typename Storage<d>::type*>(base);
  if (stride == 1)
    for (int i = 0; i < n; ++i) dst[i] = static_cast<T>(Storage<d>::load(p[i]));
  else if (stride == 2)
    for (int i = 0; i < n; ++i) dst[i] = static_cast<T>(Storage<d>::load(p[2 * i]));
  else
    for (int i = 0; i < n; ++i) dst[i] = static_cast<T>(Storage<d>::load(p[i * stride]));
}

template <typename T, DType d>
void store_run(void* base, int64_t stride, int n, const T* src) {
  auto* p = static_cast<typename Storage<d>::type*>(base);
  if (stride == 1)
    for (int i = 0; i < n; ++i) p[i] = Storage<d>::store(src[i]);
  else if (stride == 2)
    for (int i = 0; i < n; ++i) p[2 * i] = Storage<d>::store(src[i]);
  else
    for (int i = 0; i < n; ++i) p[i * stride] = Storage<d>::store(src[i]);
}

template <typename T>
LoadRun<T> load_run_for(DType d) {
  static const LoadRun<T> table[] = {load_run<T, DType::f32>, load_run<T, DType::f64>, load_run<T, DType::bf16>,
                                     load_run<T, DType::f16>};
  return table[static_cast<int>(d)];
}

template <typename T>
StoreRun<T> store_run_for(DType d) {
  static const StoreRun<T> table[] = {store_run<T, DType::f32>, store_run<T, DType::f64>, store_run<T, DType::bf16>,
                                      store_run<T, DType::f16>};
  return table[static_cast<int>(d)];
}

template <typename T>
Gather<T> gather_for(DType d) {
  static const Gather<T> table[] = {gather<T, DType::f32>, gather<T, DType::f64>, gather<T, DType::bf16>,
                                    gather<T, DType::f16>};
  return table[static_cast<int>(d)];
}

template <typename T>
Scatter<T> scatter_for(DType d) {
  static const Scatter<T> table[] = {scatter<T, DType::f32>, scatter<T, DType::f64>, scatter<T, DType::bf16>,
                                     scatter<T, DType::f16>};
  return table[static_cast<int>(d)];
}

inline int64_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

}  // namespace
}  // namespace nf
