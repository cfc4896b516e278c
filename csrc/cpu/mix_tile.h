// The arithmetic of channel mixes on tiles [C, columns] of columns at unit stride: products with a matrix, and the sums
// over columns that are its gradient.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "isa.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int kTile = 256;
constexpr int kRows = 6;                                 // output channels per block
constexpr int kVectors = NF_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of columns per block: kRows * kVectors accumulators
constexpr int kDot = NF_VECTOR_BYTES == 64 ? 4 : 3;      // dW is made in blocks of kDot x kDot

// Aligned scratch, released at the end of its scope.
template <typename T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t n) {
    const size_t bytes = (n * sizeof(T) / 64 + 1) * 64;
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data) throw std::bad_alloc();
    std::memset(data, 0, bytes);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <typename T>
struct Simd {
  typedef T type __attribute__((vector_size(NF_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = NF_VECTOR_BYTES / sizeof(T);
  static type load(const T* p) { return *reinterpret_cast<const type*>(p); }
  static void store(T* p, type v) { *reinterpret_cast<type*>(p) = v; }
};

template <typename T>
constexpr int group() {
  return kVectors * Simd<T>::lanes;
}

// y[r, :] = bias[r] + sum_k w[r, k] x[k, :] for `rows` output channels and one group of columns.
template <typename T, int rows>
void multiply_rows(const T* w, int64_t channels, const T* bias, const T* x, int64_t ldx, T* y, int64_t ldy) {
  using V = Simd<T>;
  typename V::type acc[rows][kVectors];
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < kVectors; ++v) acc[r][v] = typename V::type{};
  for (int64_t k = 0; k < channels; ++k) {
    typename V::type in[kVectors];
    NF_UNROLL
    for (int v = 0; v < kVectors; ++v) in[v] = V::load(x + k * ldx + v * V::lanes);
    NF_UNROLL
    for (int r = 0; r < rows; ++r) NF_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] += w[r * channels + k] * in[v];
  }
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < kVectors; ++v) V::store(y + r * ldy + v * V::lanes, acc[r][v] + (bias ? bias[r] : T(0)));
}

// Rows a power of two apart fall into few cache sets, so from a few row blocks on a group's columns are first copied
// into `panel` [channels, group], where each row is read once per block.
template <typename T>
void multiply_tile(const T* w, int64_t channels, const T* bias, const T* x, int64_t ldx, T* y, int64_t ldy, int columns,
                   T* panel) {
  using F = void (*)(const T*, int64_t, const T*, const T*, int64_t, T*, int64_t);
  static const F table[] = {nullptr,
                            multiply_rows<T, 1>,
                            multiply_rows<T, 2>,
                            multiply_rows<T, 3>,
                            multiply_rows<T, 4>,
                            multiply_rows<T, 5>,
                            multiply_rows<T, 6>};
  const bool copy = channels > 2 * kRows;
  for (int n = 0; n < columns; n += group<T>()) {
    if (copy)
      for (int64_t k = 0; k < channels; ++k)
        std::memcpy(panel + k * group<T>(), x + k * ldx + n, group<T>() * sizeof(T));
    const T* in = copy ? panel : x + n;
    const int64_t ld = copy ? group<T>() : ldx;
    for (int64_t o = 0; o < channels; o += kRows) {
      const int64_t rows = channels - o < kRows ? channels - o : kRows;
      table[rows](w + o * channels, channels, bias ? bias + o : nullptr, in, ld, y + o * ldy + n, ldy);
    }
  }
}

// acc[i][j] (a vector each) += dy[i, :] * x[j, :] over the tile's columns.
template <typename T, int rows, int cols>
void outer_block(const T* dy, int64_t ldy, const T* x, int64_t ldx, int columns, T* acc) {
  using V = Simd<T>;
  typename V::type sum[rows][cols];
  NF_UNROLL
  for (int i = 0; i < rows; ++i) NF_UNROLL
  for (int j = 0; j < cols; ++j) sum[i][j] = V::load(acc + (i * kDot + j) * V::lanes);
  for (int n = 0; n < columns; n += V::lanes) {
    typename V::type b[cols];
    NF_UNROLL
    for (int j = 0; j < cols; ++j) b[j] = V::load(x + j * ldx + n);
    NF_UNROLL
    for (int i = 0; i < rows; ++i) {
      const typename V::type a = V::load(dy + i * ldy + n);
      NF_UNROLL
      for (int j = 0; j < cols; ++j) sum[i][j] += a * b[j];
    }
  }
  NF_UNROLL
  for (int i = 0; i < rows; ++i) NF_UNROLL
  for (int j = 0; j < cols; ++j) V::store(acc + (i * kDot + j) * V::lanes, sum[i][j]);
}

template <typename T>
void outer_tile(const T* dy, int64_t ldy, const T* x, int64_t ldx, int64_t channels, int columns, T* acc) {
  using F = void (*)(const T*, int64_t, const T*, int64_t, int, T*);
#define NF_ROW(R)                                                                             \
  {                                                                                           \
    outer_block<T, R, 1>, outer_block<T, R, 2>, outer_block<T, R, 3>, outer_block<T, R, kDot> \
  }
  static const F table[4][4] = {NF_ROW(1), NF_ROW(2), NF_ROW(3), NF_ROW(kDot)};
#undef NF_ROW
  for (int64_t o = 0; o < channels; o += kDot)
    for (int64_t k = 0; k < channels; k += kDot) {
      const int64_t rows = channels - o < kDot ? channels - o : kDot, cols = channels - k < kDot ? channels - k : kDot;
      table[rows - 1][cols - 1](dy + o * ldy, ldy, x + k * ldx, ldx, columns, acc);
      acc += kDot * kDot * Simd<T>::lanes;
    }
}
// The sums over columns that are a mix's gradient: dW = sum dy x^T and db = sum dy, a vector of partial sums each.
template <typename T>
struct MixSums {
  static constexpr int lanes = Simd<T>::lanes;
  int64_t channels, blocks;
  Buffer<T> products, sums;

  explicit MixSums(int64_t c)
      : channels(c), blocks((c + kDot - 1) / kDot), products(blocks * blocks * kDot * kDot * lanes), sums(c * lanes) {}

  void clear() {
    std::memset(products.data, 0, blocks * blocks * kDot * kDot * lanes * sizeof(T));
    std::memset(sums.data, 0, channels * lanes * sizeof(T));
  }
  void add_products(const T* dy, int64_t ldy, const T* x, int64_t ldx, int columns) {
    outer_tile<T>(dy, ldy, x, ldx, channels, columns, products.data);
  }
  void add_sums(const T* dy, int64_t ldy, int columns) {
    for (int64_t c = 0; c < channels; ++c) {
      auto sum = Simd<T>::load(sums.data + c * lanes);
      for (int n = 0; n < columns; n += lanes) sum += Simd<T>::load(dy + c * ldy + n);
      Simd<T>::store(sums.data + c * lanes, sum);
    }
  }
  void write_products(T* dweight) {
    for (int64_t o = 0; o < channels; ++o)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t block = o / kDot * blocks + c / kDot, cell = o % kDot * kDot + c % kDot;
        dweight[o * channels + c] = total(products.data + (block * kDot * kDot + cell) * lanes);
      }
  }
  void write_sums(T* dbias) {
    for (int64_t c = 0; c < channels; ++c) dbias[c] = total(sums.data + c * lanes);
  }

  // Halves added to halves: a chain of scalar additions would cost more than the products did.
  static T total(T* v) {
    for (int half = lanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) v[l] += v[l + half];
    return v[0];
  }
};

// out[i] = the sum of partial[0..parts) [i], in that order.
template <typename T, typename Out>
void add_partials(const T* partial, int64_t parts, int64_t n, Out* out) {
  for (int64_t i = 0; i < n; ++i) {
    T sum = 0;
    for (int64_t c = 0; c < parts; ++c) sum += partial[c * n + i];
    out[i] = static_cast<Out>(sum);
  }
}

// to = w^T, both [channels, channels].
template <typename T>
void transpose(const T* w, int64_t channels, T* to) {
  for (int64_t o = 0; o < channels; ++o)
    for (int64_t c = 0; c < channels; ++c) to[c * channels + o] = w[o * channels + c];
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
