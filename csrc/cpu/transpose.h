// Four floats of each of kStrip rows, as four vectors with a lane for each row, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)  // whose own intrinsics read what they call undefined
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace nf {
namespace NF_ISA {
namespace {

// load_squares: element j of quarter q of the vector is value j of row 4 q. Four of them, of rows 0 to 3 and on,
// transpose within their quarters to vectors whose lane l is row l.
#if NF_VECTOR_BYTES == 64
constexpr int kStrip = 16;
using Strip = __m512;
inline Strip load_squares(const float* p, const int64_t* at) {
  Strip v = _mm512_castps128_ps512(_mm_loadu_ps(p + at[0]));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + at[4]), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + at[8]), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(p + at[12]), 3);
}
inline void store_squares(float* p, const int64_t* at, Strip v) {
  _mm_storeu_ps(p + at[0], _mm512_castps512_ps128(v));
  _mm_storeu_ps(p + at[4], _mm512_extractf32x4_ps(v, 1));
  _mm_storeu_ps(p + at[8], _mm512_extractf32x4_ps(v, 2));
  _mm_storeu_ps(p + at[12], _mm512_extractf32x4_ps(v, 3));
}
#define NF_LOW(a, b) _mm512_unpacklo_ps(a, b)
#define NF_HIGH(a, b) _mm512_unpackhi_ps(a, b)
#define NF_FRONT(a, b) _mm512_shuffle_ps(a, b, 0x44)
#define NF_BACK(a, b) _mm512_shuffle_ps(a, b, 0xee)
#elif NF_VECTOR_BYTES == 32
constexpr int kStrip = 8;
using Strip = __m256;
inline Strip load_squares(const float* p, const int64_t* at) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + at[0])), _mm_loadu_ps(p + at[4]), 1);
}
inline void store_squares(float* p, const int64_t* at, Strip v) {
  _mm_storeu_ps(p + at[0], _mm256_castps256_ps128(v));
  _mm_storeu_ps(p + at[4], _mm256_extractf128_ps(v, 1));
}
#define NF_LOW(a, b) _mm256_unpacklo_ps(a, b)
#define NF_HIGH(a, b) _mm256_unpackhi_ps(a, b)
#define NF_FRONT(a, b) _mm256_shuffle_ps(a, b, 0x44)
#define NF_BACK(a, b) _mm256_shuffle_ps(a, b, 0xee)
#else
constexpr int kStrip = 4;
typedef float Strip __attribute__((vector_size(16)));
typedef int32_t StripIndex __attribute__((vector_size(16)));
inline Strip load_squares(const float* p, const int64_t* at) {
  Strip v;
  std::memcpy(&v, p + at[0], sizeof v);
  return v;
}
inline void store_squares(float* p, const int64_t* at, Strip v) { std::memcpy(p + at[0], &v, sizeof v); }
#if defined(__clang__)
#define NF_MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define NF_MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, StripIndex{i, j, k, l})
#endif
#define NF_LOW(a, b) NF_MIX(a, b, 0, 4, 1, 5)
#define NF_HIGH(a, b) NF_MIX(a, b, 2, 6, 3, 7)
#define NF_FRONT(a, b) NF_MIX(a, b, 0, 1, 4, 5)
#define NF_BACK(a, b) NF_MIX(a, b, 2, 3, 6, 7)
#endif

// Within each quarter; its own inverse.
inline void transpose(const Strip* in, Strip* out) {
  const Strip a = NF_LOW(in[0], in[1]), b = NF_LOW(in[2], in[3]);
  const Strip c = NF_HIGH(in[0], in[1]), d = NF_HIGH(in[2], in[3]);
  out[0] = NF_FRONT(a, b), out[1] = NF_BACK(a, b), out[2] = NF_FRONT(c, d), out[3] = NF_BACK(c, d);
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
