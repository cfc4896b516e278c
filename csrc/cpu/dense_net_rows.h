// Products of few rows with packed matrices, the sums over rows that are their gradients, and activations.
#pragma once

#include "../include/dense_net.h"
#include "../include/scalar_math.h"
#include "lu_tile.h"

namespace nf {
namespace NF_ISA {
namespace {

template <typename T>
int64_t whole_vectors(int64_t n) {
  return (n + Simd<T>::lanes - 1) / Simd<T>::lanes * Simd<T>::lanes;
}

#define NF_OF_VECTORS(kernel, V) \
  {kernel<T, 1, V>, kernel<T, 2, V>, kernel<T, 3, V>, kernel<T, 4, V>, kernel<T, 5, V>, kernel<T, 6, V>}
#define NF_OF_ROWS(kernel)                                                                             \
  {NF_OF_VECTORS(kernel, 1), NF_OF_VECTORS(kernel, 2), NF_OF_VECTORS(kernel, (kVectors == 4 ? 3 : 2)), \
   NF_OF_VECTORS(kernel, kVectors)}

// y[r, :] = sum over k < depth of x[r, k] w[k, :] + bias + base[r, :]; of the last vector `tail` elements are written.
template <typename T, int rows, int vectors>
void dense_block(const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, const T* base, int64_t ldbase,
                 int64_t depth, T* y, int64_t ldy, int64_t tail) {
  using V = Simd<T>;
  typename V::type sum[rows][vectors];
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < vectors; ++v) sum[r][v] = bias ? V::load(bias + v * V::lanes) : typename V::type{};
  for (int64_t k = 0; k < depth; ++k) {
    typename V::type in[vectors];
    NF_UNROLL
    for (int v = 0; v < vectors; ++v) in[v] = V::load(w + k * ldw + v * V::lanes);
    NF_UNROLL
    for (int r = 0; r < rows; ++r) NF_UNROLL
    for (int v = 0; v < vectors; ++v) sum[r][v] += x[r * ldx + k] * in[v];
  }
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < vectors; ++v) {
    if (base) sum[r][v] += V::load(base + r * ldbase + v * V::lanes);
    T* to = y + r * ldy + v * V::lanes;
    if (v + 1 < vectors || tail == V::lanes)
      V::store(to, sum[r][v]);
    else
      std::memcpy(to, &sum[r][v], tail * sizeof(T));
  }
}

// y[:, :width] = x w + bias + base for `count` rows; w's rows, bias and base's rows are whole vectors, y's need not be
// where `width` is not.
template <typename T>
void dense(const T* x, int64_t ldx, const T* w, int64_t depth, int64_t width, const T* bias, const T* base,
           int64_t ldbase, int64_t count, T* y, int64_t ldy) {
  using F = void (*)(const T*, int64_t, const T*, int64_t, const T*, const T*, int64_t, int64_t, T*, int64_t, int64_t);
  static const F table[][kRows] = NF_OF_ROWS(dense_block);
  const int64_t ldw = whole_vectors<T>(width), lanes = Simd<T>::lanes;
  for (int64_t j = 0; j < ldw; j += group<T>()) {
    const int64_t vectors = ldw - j < group<T>() ? (ldw - j) / lanes : kVectors;
    const int64_t tail = j + vectors * lanes > width ? width - j - (vectors - 1) * lanes : lanes;
    for (int64_t n = 0; n < count; n += kRows) {
      const int64_t rows = count - n < kRows ? count - n : kRows;
      table[vectors - 1][rows - 1](x + n * ldx, ldx, w + j, ldw, bias ? bias + j : nullptr,
                                   base ? base + n * ldbase + j : nullptr, ldbase, depth, y + n * ldy + j, ldy, tail);
    }
  }
}

// acc[i, :] += sum over `count` rows of a[i] b[:], for `rows` of acc's rows and `vectors` of its columns.
template <typename T, int rows, int vectors>
void dense_outer_block(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t count, T* acc, int64_t ld) {
  using V = Simd<T>;
  typename V::type sum[rows][vectors];
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < vectors; ++v) sum[r][v] = V::load(acc + r * ld + v * V::lanes);
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
  for (int v = 0; v < vectors; ++v) V::store(acc + r * ld + v * V::lanes, sum[r][v]);
}

// acc [height, whole width] += a^T b and sums += a's columns, over `count` rows.
template <typename T>
void add_outer(const T* a, int64_t lda, int64_t height, const T* b, int64_t ldb, int64_t width, int64_t count, T* acc,
               T* sums) {
  using F = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, int64_t);
  static const F table[][kRows] = NF_OF_ROWS(dense_outer_block);
  const int64_t ld = whole_vectors<T>(width);
  for (int64_t j = 0; j < ld; j += group<T>()) {
    const int64_t vectors = ld - j < group<T>() ? (ld - j) / Simd<T>::lanes : kVectors;
    for (int64_t i = 0; i < height; i += kRows) {
      const int64_t rows = height - i < kRows ? height - i : kRows;
      table[vectors - 1][rows - 1](a + i, lda, b + j, ldb, count, acc + i * ld + j, ld);
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    NF_INDEPENDENT
    for (int64_t i = 0; i < height; ++i) sums[i] += a[n * lda + i];
  }
}

#undef NF_OF_ROWS
#undef NF_OF_VECTORS

// to [depth, whole height] = w^T of w [height, depth]; `to` is zero before.
template <typename T>
void pack_transposed(const T* w, int64_t height, int64_t depth, T* to) {
  const int64_t ld = whole_vectors<T>(height);
  int64_t rows = 0;
#ifdef NF_CAN_SHUFFLE
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t whole = depth / lanes * lanes;
  for (; rows + lanes <= height; rows += lanes) {
    for (int64_t k = 0; k < whole; k += lanes)
      transpose_square<T>([&](int64_t i) { return w + (rows + i) * depth + k; },
                          [&](int64_t i) { return to + (k + i) * ld + rows; });
    for (int64_t k = whole; k < depth; ++k)
      for (int64_t i = 0; i < lanes; ++i) to[k * ld + rows + i] = w[(rows + i) * depth + k];
  }
#endif
  for (; rows < height; ++rows)
    for (int64_t k = 0; k < depth; ++k) to[k * ld + rows] = w[rows * depth + k];
}

// --- activations -----------------------------------------------------------------------------------------------------

template <typename T>
NF_FN T sigmoid_(T z) {
  const T u = exp_minus_abs(z), r = T(1) / (T(1) + u);
  return z < T(0) ? u * r : r;
}

// Each: its value, and its derivative, at z. A NaN stays one.
struct Relu {
  template <typename T>
  NF_FN T value(T z) {
    return z < T(0) ? T(0) : z;
  }
  template <typename T>
  NF_FN T slope(T z) {
    return z > T(0) ? T(1) : T(0);
  }
};
struct LeakyRelu {
  template <typename T>
  NF_FN T value(T z) {
    return z < T(0) ? z * T(0.01) : z;
  }
  template <typename T>
  NF_FN T slope(T z) {
    return z > T(0) ? T(1) : T(0.01);
  }
};
struct Elu {
  template <typename T>
  NF_FN T value(T z) {
    const T below = exp_minus_abs(z) - T(1);
    return z < T(0) ? below : z;
  }
  template <typename T>
  NF_FN T slope(T z) {
    const T u = exp_minus_abs(z);
    return z > T(0) ? T(1) : u;
  }
};
struct Tanh {
  template <typename T>
  NF_FN T value(T z) {
    return tanh_(z);
  }
  template <typename T>
  NF_FN T slope(T z) {
    const T t = tanh_(z);
    return T(1) - t * t;
  }
};
struct Silu {
  template <typename T>
  NF_FN T value(T z) {
    return z * sigmoid_(z);
  }
  template <typename T>
  NF_FN T slope(T z) {
    const T s = sigmoid_(z);
    return s + z * s * (T(1) - s);
  }
};
struct Softplus {
  template <typename T>
  NF_FN T value(T z) {
    const T l = log1p_unit(exp_minus_abs(z));
    return (z < T(0) ? T(0) : z) + l;
  }
  template <typename T>
  NF_FN T slope(T z) {
    return sigmoid_(z);
  }
};

template <typename A, typename T>
void value_of(const T* z, T* to, int64_t n) {
  NF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) to[i] = A::value(z[i]);
}

template <typename A, typename T>
void slope_times(const T* z, const T* up, T* to, int64_t n) {
  NF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) to[i] = up[i] * A::slope(z[i]);
}

template <typename A, typename T>
void add_slope_times(const T* z, const T* up, T* to, int64_t n) {
  NF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) to[i] += up[i] * A::slope(z[i]);
}

template <typename T>
struct Activated {
  void (*value)(const T* z, T* to, int64_t n);
  void (*slope_times)(const T* z, const T* up, T* to, int64_t n);      // to = up act'(z), in up's place if wanted
  void (*add_slope_times)(const T* z, const T* up, T* to, int64_t n);  // to += up act'(z)
};

template <typename T>
Activated<T> activated(NetActivation a) {
#define NF_ACTIVATED(A)                                      \
  {                                                          \
    value_of<A, T>, slope_times<A, T>, add_slope_times<A, T> \
  }
  static const Activated<T> table[] = {NF_ACTIVATED(Relu), NF_ACTIVATED(LeakyRelu), NF_ACTIVATED(Elu),
                                       NF_ACTIVATED(Tanh), NF_ACTIVATED(Silu),      NF_ACTIVATED(Softplus)};
#undef NF_ACTIVATED
  return table[static_cast<int>(a)];
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
