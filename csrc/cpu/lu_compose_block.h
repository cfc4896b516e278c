// Blocks of the LU composition on the CPU: products and substitutions of kRows rows by a group of columns that stay in
// registers, and the factors as doubles in scratch, padded to whole groups of columns and blocks of rows.
#pragma once

#include "../include/lu_compose.h"
#include "mix_tile.h"

namespace nf {
namespace NF_ISA {
namespace {

using Vector = Simd<double>;
constexpr int kWide = 2;  // vectors of a group: wider ones would waste more of the triangles
constexpr int kGroup = kWide * Vector::lanes;
constexpr int64_t kUnits = 8;       // wanted in all, whatever the threads: few matrices are cut for that
constexpr int64_t kSmall = 96;      // channels up to which a matrix is never cut
constexpr int64_t kWork = 1 << 17;  // multiply-adds that are worth another thread

int64_t round_up(int64_t n, int64_t by) { return (n + by - 1) / by * by; }

// A matrix as its rows are read one element at a time: element (row, k) at data[row * r + k * step].
struct Coefficients {
  const double* data;
  int64_t r, step;
};

// acc[i][:] += sign * sum over k in [k0, k1) of a(row + i, k) x[k, :], for one group of columns at x.
template <int rows, bool minus>
NF_FN void accumulate(const Coefficients& a, int64_t row, int64_t k0, int64_t k1, const double* x, int64_t ldx,
                      typename Vector::type (&acc)[rows][kWide]) {
  const double* from = a.data + row * a.r;
  for (int64_t k = k0; k < k1; ++k) {
    typename Vector::type in[kWide];
    NF_UNROLL
    for (int v = 0; v < kWide; ++v) in[v] = Vector::load(x + k * ldx + v * Vector::lanes);
    NF_UNROLL
    for (int i = 0; i < rows; ++i) NF_UNROLL
    for (int v = 0; v < kWide; ++v) {
      const double w = from[i * a.r + k * a.step];
      if (minus)
        acc[i][v] -= w * in[v];
      else
        acc[i][v] += w * in[v];
    }
  }
}

template <int rows>
NF_FN void load_rows(const double* from, int64_t ld, typename Vector::type (&acc)[rows][kWide]) {
  NF_UNROLL
  for (int i = 0; i < rows; ++i) NF_UNROLL
  for (int v = 0; v < kWide; ++v) acc[i][v] = Vector::load(from + i * ld + v * Vector::lanes);
}

template <int rows>
NF_FN void store_rows(double* to, int64_t ld, const typename Vector::type (&acc)[rows][kWide]) {
  NF_UNROLL
  for (int i = 0; i < rows; ++i) NF_UNROLL
  for (int v = 0; v < kWide; ++v) Vector::store(to + i * ld + v * Vector::lanes, acc[i][v]);
}

// y[row .. row + kRows, a group] = sum over k in [k0, k1) of a(., k) x[k, :]; y and x point at the group.
void product(const Coefficients& a, int64_t row, int64_t k0, int64_t k1, const double* x, int64_t ldx, double* y,
             int64_t ldy) {
  typename Vector::type acc[kRows][kWide] = {};
  accumulate<kRows, false>(a, row, k0, k1, x, ldx, acc);
  store_rows<kRows>(y + row * ldy, ldy, acc);
}

// Rows `row ..` of (L + I)^-1 X, X in place, those above being done; their sums begin at k0.
void substitute_down(const double* lower, int64_t ld, int64_t row, int64_t k0, double* x, int64_t ldx) {
  typename Vector::type acc[kRows][kWide];
  load_rows<kRows>(x + row * ldx, ldx, acc);
  accumulate<kRows, true>({lower, ld, 1}, row, k0, row, x, ldx, acc);
  NF_UNROLL
  for (int i = 1; i < kRows; ++i) NF_UNROLL
  for (int j = 0; j < i; ++j) {
    const double w = lower[(row + i) * ld + row + j];
    NF_UNROLL
    for (int v = 0; v < kWide; ++v) acc[i][v] -= w * acc[j][v];
  }
  store_rows<kRows>(x + row * ldx, ldx, acc);
}

// Rows `row ..` of U^-1 X, those below being done; `reciprocal` is 1 / the diagonal.
void substitute_up(const double* upper, int64_t ld, const double* reciprocal, int64_t row, int64_t end, double* x,
                   int64_t ldx) {
  typename Vector::type acc[kRows][kWide];
  load_rows<kRows>(x + row * ldx, ldx, acc);
  accumulate<kRows, true>({upper, ld, 1}, row, row + kRows, end, x, ldx, acc);
  NF_UNROLL
  for (int i = kRows - 1; i >= 0; --i) {
    NF_UNROLL
    for (int j = i + 1; j < kRows; ++j) {
      const double w = upper[(row + i) * ld + row + j];
      NF_UNROLL
      for (int v = 0; v < kWide; ++v) acc[i][v] -= w * acc[j][v];
    }
    NF_UNROLL
    for (int v = 0; v < kWide; ++v) acc[i][v] *= reciprocal[row + i];
  }
  store_rows<kRows>(x + row * ldx, ldx, acc);
}

// --- one matrix ------------------------------------------------------------------------------------------------------

// How matrices lie in scratch, and into how many units each is cut.
struct Shape {
  int64_t channels, rows, columns;  // C, and C padded to blocks of rows and groups of columns
  int64_t square;                   // a padded matrix, and what a block of rows may begin inside it and reach past it
  int64_t units, per_unit;          // of a matrix; groups of columns (or runs of kGroup rows) of a unit

  explicit Shape(const LUFactors& lu) {
    channels = lu.channels;
    // Coefficients of padded rows are read along k, too.
    rows = round_up(channels, kRows);
    columns = round_up(channels > rows ? channels : rows, kGroup);
    square = (columns + kRows) * columns;
    const int64_t groups = columns / kGroup;
    units = channels <= kSmall || lu.count >= kUnits ? 1 : kUnits / (lu.count > 0 ? lu.count : 1);
    if (units > groups) units = groups;
    if (units < 1) units = 1;
    per_unit = units ? (groups + units - 1) / units : 0;
    units = groups ? (groups + per_unit - 1) / per_unit : 1;
  }
  int64_t begin(int64_t unit) const { return unit * per_unit * kGroup; }
  int64_t end(int64_t unit) const {
    const int64_t last = (unit + 1) * per_unit * kGroup;
    return last < columns ? last : columns;
  }
};

template <typename T>
void diagonal_of(const LUFactors& lu, int64_t k, double* s) {
  const auto* raw = static_cast<const T*>(lu.log_s) + k * lu.channels;
  const auto* sign = lu.sign ? static_cast<const T*>(lu.sign) + k * lu.channels : nullptr;
  for (int64_t i = 0; i < lu.channels; ++i)
    s[i] = diagonal_value(lu.diagonal, static_cast<double>(raw[i]), sign ? static_cast<double>(sign[i]) : 1.0, lu.eps);
}

// Of a row of n: the elements of [begin, end), zeros around them. Both read all of the row, so that they vectorise.
template <typename T>
NF_FN void widen(const T* from, int64_t n, int64_t begin, int64_t end, double* to) {
  NF_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const double v = static_cast<double>(from[j]);
    to[j] = j >= begin && j < end ? v : 0.0;
  }
}

template <typename T>
NF_FN void narrow(const double* from, int64_t n, int64_t begin, int64_t end, T* to) {
  NF_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const T v = static_cast<T>(from[j]);
    to[j] = j >= begin && j < end ? v : T(0);
  }
}

// to [n, ld] = the transpose of from [n, n], eight rows at a time.
template <typename T>
void widen_transposed(const T* from, int64_t n, double* to, int64_t ld) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t j = 0; j < n; ++j) {
      double column[8];
      NF_UNROLL
      for (int e = 0; e < 8; ++e) column[e] = static_cast<double>(from[(i + e) * n + j]);
      std::memcpy(to + j * ld + i, column, sizeof column);
    }
  for (; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) to[j * ld + i] = static_cast<double>(from[i * n + j]);
}

// The strict lower triangle with `diagonal` on its diagonal, zeros above. The padding stays as it is.
template <typename T>
void load_lower(const LUFactors& lu, const Shape& at, int64_t k, double diagonal, double* to) {
  const int64_t c = at.channels, ld = at.columns;
  const auto* from = static_cast<const T*>(lu.lower) + k * c * c;
  for (int64_t i = 0; i < c; ++i) {
    widen(from + i * c, c, 0, i, to + i * ld);
    to[i * ld + i] = diagonal;
  }
}

// The upper triangle with s on the diagonal, zeros below.
template <typename T>
void load_upper(const LUFactors& lu, const Shape& at, int64_t k, const double* s, double* to) {
  const int64_t c = at.channels, ld = at.columns;
  const auto* from = static_cast<const T*>(lu.upper) + k * c * c;
  for (int64_t i = 0; i < c; ++i) {
    widen(from + i * c, c, i + 1, c, to + i * ld);
    to[i * ld + i] = s[i];
  }
}

template <typename T>
void load_upper_transposed(const LUFactors& lu, const Shape& at, int64_t k, const double* s, double* to) {
  const int64_t c = at.channels, ld = at.columns;
  widen_transposed(static_cast<const T*>(lu.upper) + k * c * c, c, to, ld);
  for (int64_t i = 0; i < c; ++i) {
    to[i * ld + i] = s[i];
    for (int64_t j = i + 1; j < c; ++j) to[i * ld + j] = 0.0;
  }
}

template <typename T>
void load_matrix(const void* data, const Shape& at, int64_t k, bool transposed, double* to) {
  const int64_t c = at.channels;
  const auto* from = static_cast<const T*>(data) + k * c * c;
  if (transposed) return widen_transposed(from, c, to, at.columns);
  for (int64_t i = 0; i < c; ++i) widen(from + i * c, c, 0, c, to + i * at.columns);
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
