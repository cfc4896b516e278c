// Tables as they lie in memory, [columns, channels] with whole vectors to a row: products with a dense matrix and the
// sums over columns that are its gradient, without a tile in between.
#pragma once

#include "mix_pack.h"

namespace nf {
namespace NF_ISA {
namespace {

// Every [vectors - 1][rows - 1] of a kernel that is instantiated for both.
#define NF_OF_VECTORS(kernel, V) \
  {kernel<T, 1, V>, kernel<T, 2, V>, kernel<T, 3, V>, kernel<T, 4, V>, kernel<T, 5, V>, kernel<T, 6, V>}
#define NF_OF_ROWS(kernel)                                                                             \
  {NF_OF_VECTORS(kernel, 1), NF_OF_VECTORS(kernel, 2), NF_OF_VECTORS(kernel, (kVectors == 4 ? 3 : 2)), \
   NF_OF_VECTORS(kernel, kVectors)}

// Whether a view is such a table, in the arithmetic's type.
template <typename T>
bool lies_in_rows(const View& v, DType data, int64_t batch, int64_t channels) {
  return data == native<T>() && batch == 1 && v.c == 1 && channels % Simd<T>::lanes == 0;
}

// y[r, :] = sum over k of x[r, k] w[k, :] + bias, for `rows` rows and `vectors` of w's columns.
template <typename T, int rows, int vectors>
void product_of_rows(const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, int64_t channels, T* y,
                     int64_t ldy) {
  using V = Simd<T>;
  typename V::type sum[rows][vectors];
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < vectors; ++v) sum[r][v] = bias ? V::load(bias + v * V::lanes) : typename V::type{};
  for (int64_t k = 0; k < channels; ++k) {
    typename V::type in[vectors];
    NF_UNROLL
    for (int v = 0; v < vectors; ++v) in[v] = V::load(w + k * ldw + v * V::lanes);
    NF_UNROLL
    for (int r = 0; r < rows; ++r) NF_UNROLL
    for (int v = 0; v < vectors; ++v) sum[r][v] += x[r * ldx + k] * in[v];
  }
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < vectors; ++v) V::store(y + r * ldy + v * V::lanes, sum[r][v]);
}

// y = x w + bias for `count` rows; w is [channels, channels].
template <typename T>
void multiply_rows_by(const T* x, int64_t ldx, const T* w, const T* bias, int64_t count, int64_t channels, T* y,
                      int64_t ldy) {
  using F = void (*)(const T*, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t);
  static const F table[][kRows] = NF_OF_ROWS(product_of_rows);
  for (int64_t j = 0; j < channels; j += group<T>()) {
    const int64_t vectors = channels - j < group<T>() ? (channels - j) / Simd<T>::lanes : kVectors;
    for (int64_t n = 0; n < count; n += kRows) {
      const int64_t rows = count - n < kRows ? count - n : kRows;
      table[vectors - 1][rows - 1](x + n * ldx, ldx, w + j, channels, bias ? bias + j : nullptr, channels,
                                   y + n * ldy + j, ldy);
    }
  }
}

// acc[i, :] += sum over `count` rows of a[i] b[:], for `rows` of dW's rows and `vectors` of its columns: both from
// memory as tables lie in it.
template <typename T, int rows, int vectors>
void outer_of_rows(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t count, T* acc, int64_t ld) {
  using V = Simd<T>;
  typename V::type sum[rows][vectors];
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < vectors; ++v) sum[r][v] = typename V::type{};
  for (int64_t n = 0; n < count; ++n) {
    typename V::type in[vectors];
    NF_UNROLL
    for (int v = 0; v < vectors; ++v) in[v] = V::load(b + n * ldb + v * V::lanes);
    NF_UNROLL
    for (int r = 0; r < rows; ++r) NF_UNROLL
    for (int v = 0; v < vectors; ++v) sum[r][v] += a[n * lda + r] * in[v];
  }
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < vectors; ++v) {
    T* to = acc + r * ld + v * V::lanes;
    V::store(to, V::load(to) + sum[r][v]);
  }
}

// Rows that stay in the first cache while all of dW passes over them; their sum is added to the others' as a whole.
constexpr int64_t kNear = 64;

template <typename T>
void add_outer_of_rows(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t count, int64_t channels, T* acc) {
  using F = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, int64_t);
  static const F table[][kRows] = NF_OF_ROWS(outer_of_rows);
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t n = 0; n < count; n += kNear)
    for (int64_t j = 0; j < channels; j += group<T>()) {
      const int64_t vectors = channels - j < group<T>() ? (channels - j) / lanes : kVectors;
      for (int64_t i = 0; i < channels; i += kRows) {
        const int64_t rows = channels - i < kRows ? channels - i : kRows;
        table[vectors - 1][rows - 1](a + n * lda + i, lda, b + n * ldb + j, ldb, count - n < kNear ? count - n : kNear,
                                     acc + i * channels + j, channels);
      }
    }
}

// sums[c] += the sum over `count` rows of a[:, c].
template <typename T>
void add_sums_of_rows(const T* a, int64_t lda, int64_t count, int64_t channels, T* sums) {
  for (int64_t n = 0; n < count; ++n) {
    NF_INDEPENDENT
    for (int64_t c = 0; c < channels; ++c) sums[c] += a[n * lda + c];
  }
}

#undef NF_OF_ROWS
#undef NF_OF_VECTORS

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
