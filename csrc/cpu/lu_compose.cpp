// W = P (L + I) (U + diag(s)), W^-1 and the sum of log|s| on the CPU, in double, and their gradients.
//
// Every product is made in blocks of kRows rows by a group of columns that stay in registers; the substitutions are
// products with the rows above (below), and a small triangle of rows in registers. A unit of work is a matrix, or, of
// few large ones, some of its columns or rows: cut by shape alone, and every number is made in one order, so results
// do not depend on the thread count. Buffers are padded to whole groups of columns and blocks of rows.

#include "../include/kernels.h"
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

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardJob {
  const LUComposeForward& io;
  Shape at;

  struct Scratch {
    Buffer<double> s, reciprocal, lower, upper, made;
    explicit Scratch(const Shape& at)
        : s(at.columns), reciprocal(at.columns), lower(at.square), upper(at.square), made(at.square) {}
  };

  // Columns [n0, n1) of (L + I) U, written with its rows permuted.
  void make_weight(int64_t k, int64_t n0, int64_t n1, Scratch& m) const {
    const int64_t c = at.channels, ld = at.columns;
    load_lower<T>(io.lu, at, k, 1.0, m.lower.data);
    for (int64_t n = n0; n < n1; n += kGroup)
      for (int64_t row = 0; row < at.rows; row += kRows) {
        const int64_t last = row + kRows < n + kGroup ? row + kRows : n + kGroup;
        product({m.lower.data, ld, 1}, row, 0, last, m.upper.data + n, ld, m.made.data + n, ld);
      }
    const int64_t* p = io.lu.permutation ? io.lu.permutation + k * c : nullptr;
    auto* to = static_cast<T*>(io.weight) + k * c * c;
    for (int64_t i = 0; i < c; ++i) {
      const double* from = m.made.data + (p ? p[i] : i) * ld;
      for (int64_t n = n0; n < n1 && n < c; ++n) to[i * c + n] = static_cast<T>(from[n]);
    }
  }

  // Columns [n0, n1) of U^-1 (L + I)^-1, each written where the permutation puts it.
  void make_inverse(int64_t k, int64_t n0, int64_t n1, Scratch& m) const {
    const int64_t c = at.channels, ld = at.columns;
    load_lower<T>(io.lu, at, k, 0.0, m.lower.data);
    for (int64_t i = 0; i < at.rows; ++i)
      for (int64_t n = n0; n < n1; ++n) m.made.data[i * ld + n] = i == n ? 1.0 : 0.0;
    for (int64_t i = 0; i < c; ++i) m.reciprocal.data[i] = 1.0 / m.s.data[i];
    for (int64_t n = n0; n < n1; n += kGroup) {
      for (int64_t row = n / kRows * kRows; row < at.rows; row += kRows)
        substitute_down(m.lower.data, ld, row, n, m.made.data + n, ld);
      for (int64_t row = at.rows - kRows; row >= 0; row -= kRows)
        substitute_up(m.upper.data, ld, m.reciprocal.data, row, at.rows, m.made.data + n, ld);
    }
    const int64_t* p = io.lu.permutation ? io.lu.permutation + k * c : nullptr;
    auto* to = static_cast<T*>(io.inverse) + k * c * c;
    for (int64_t i = 0; i < c; ++i) {
      const double* from = m.made.data + i * ld;
      if (!p)
        for (int64_t n = n0; n < n1 && n < c; ++n) to[i * c + n] = static_cast<T>(from[n]);
      else if (at.units == 1)
        for (int64_t n = 0; n < c; ++n) to[i * c + n] = static_cast<T>(from[p[n]]);
      else
        for (int64_t n = 0; n < c; ++n)
          if (p[n] >= n0 && p[n] < n1) to[i * c + n] = static_cast<T>(from[p[n]]);
    }
  }

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<ForwardJob*>(self);
    Scratch m(job.at);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / job.at.units, n0 = job.at.begin(i % job.at.units), n1 = job.at.end(i % job.at.units);
      diagonal_of<T>(job.io.lu, k, m.s.data);
      load_upper<T>(job.io.lu, job.at, k, m.s.data, m.upper.data);
      if (job.io.weight) job.make_weight(k, n0, n1, m);
      if (job.io.inverse) job.make_inverse(k, n0, n1, m);
    }
  }
};

template <typename T>
void forward(const LUComposeForward& io, const Launch& on) {
  const LUFactors& lu = io.lu;
  const int64_t all = lu.count * lu.channels;
  if (io.logdet) {
    const auto* raw = static_cast<const T*>(lu.log_s);
    double sum = 0;
    for (int64_t i = 0; i < all; ++i) {
      const double r = static_cast<double>(raw[i]);
      sum += diagonal_log(lu.diagonal, r, diagonal_value(lu.diagonal, r, 1.0, lu.eps));
    }
    *static_cast<T*>(io.logdet) = static_cast<T>(sum);
  }
  if (all == 0 || !(io.weight || io.inverse)) return;
  ForwardJob<T> job{io, Shape(lu)};
  const int64_t cube = lu.channels * lu.channels * lu.channels;
  const int64_t work = (io.weight ? cube / 3 : 0) + (io.inverse ? 2 * cube / 3 : 0);
  const int64_t units = lu.count * job.at.units;
  on.parallel(units, 1 + kWork * job.at.units / (work + 1), &job, ForwardJob<T>::body);
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardJob {
  const LUComposeBackward& io;
  Shape at;
  double* gradients;  // G of all matrices where they are cut into units, else null

  struct Scratch {
    Buffer<double> s, a, b, made, grad;
    Scratch(const Shape& at, bool through)
        : s(at.columns), a(at.square), b(at.square), made(through ? at.square : 0), grad(at.square) {}
  };

  int64_t rows_end(int64_t n1) const { return n1 < at.channels ? n1 : at.channels; }

  // Rows [n0, n1) of dW - V^T dV V^T, each at the place in G where the permutation puts it.
  void make_gradient(int64_t k, int64_t n0, int64_t n1, Scratch& m, double* grad) const {
    const int64_t c = at.channels, ld = at.columns;
    const int64_t* p = io.lu.permutation ? io.lu.permutation + k * c : nullptr;
    const int64_t end = rows_end(n1);
    if (io.dinverse) {
      load_matrix<T>(io.inverse, at, k, false, m.a.data);
      load_matrix<T>(io.dinverse, at, k, false, m.b.data);
      for (int64_t n = 0; n < ld; n += kGroup)
        for (int64_t row = n0; row < end; row += kRows)
          product({m.a.data, 1, ld}, row, 0, c, m.b.data + n, ld, m.made.data + n, ld);
      load_matrix<T>(io.inverse, at, k, true, m.b.data);
      for (int64_t n = 0; n < ld; n += kGroup)
        for (int64_t row = n0; row < end; row += kRows)
          product({m.made.data, ld, 1}, row, 0, c, m.b.data + n, ld, m.a.data + n, ld);
    }
    const auto* dweight = static_cast<const T*>(io.dweight) + k * c * c;
    for (int64_t i = n0; i < end; ++i) {
      double* to = grad + (p ? p[i] : i) * ld;
      const double* through = m.a.data + i * ld;
      if (io.dweight && io.dinverse)
        for (int64_t n = 0; n < c; ++n) to[n] = static_cast<double>(dweight[i * c + n]) - through[n];
      else if (io.dweight)
        for (int64_t n = 0; n < c; ++n) to[n] = static_cast<double>(dweight[i * c + n]);
      else
        for (int64_t n = 0; n < c; ++n) to[n] = -through[n];
    }
  }

  // Rows [n0, n1) of dL = tril(G U^T), of dU = triu(L^T G), and of dlog_s.
  void make_parameters(int64_t k, int64_t n0, int64_t n1, Scratch& m, const double* grad) const {
    const int64_t c = at.channels, ld = at.columns, end = rows_end(n1);
    auto* dlower = static_cast<T*>(io.dlower) + k * c * c;
    auto* dupper = static_cast<T*>(io.dupper) + k * c * c;
    if (io.dweight || io.dinverse) {
      load_upper_transposed<T>(io.lu, at, k, m.s.data, m.b.data);
      for (int64_t row = n0; row < end; row += kRows)
        for (int64_t n = 0; n < row + kRows; n += kGroup)
          product({grad, ld, 1}, row, n, c, m.b.data + n, ld, m.a.data + n, ld);
      for (int64_t i = n0; i < end; ++i) narrow(m.a.data + i * ld, c, 0, i, dlower + i * c);
      load_lower<T>(io.lu, at, k, 1.0, m.b.data);
      for (int64_t row = n0; row < end; row += kRows)
        for (int64_t n = row / kGroup * kGroup; n < ld; n += kGroup)
          product({m.b.data, 1, ld}, row, row, c, grad + n, ld, m.a.data + n, ld);
      for (int64_t i = n0; i < end; ++i) narrow(m.a.data + i * ld, c, i + 1, c, dupper + i * c);
    } else {
      for (int64_t i = n0 * c; i < end * c; ++i) dlower[i] = dupper[i] = T(0);
    }
    const auto* raw = static_cast<const T*>(io.lu.log_s) + k * c;
    auto* dlog_s = static_cast<T*>(io.dlog_s) + k * c;
    const double dlogdet = io.dlogdet ? static_cast<double>(*static_cast<const T*>(io.dlogdet)) : 0.0;
    for (int64_t i = n0; i < end; ++i) {
      const double slope = diagonal_slope(io.lu.diagonal, static_cast<double>(raw[i]), m.s.data[i]);
      double d = io.dweight || io.dinverse ? m.a.data[i * ld + i] * slope : 0.0;
      if (io.dlogdet) d += dlogdet * (io.lu.diagonal == Diagonal::exp ? 1.0 : slope / m.s.data[i]);
      dlog_s[i] = static_cast<T>(d);
    }
  }

  template <bool gradient, bool parameters>
  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<BackwardJob*>(self);
    const Shape& at = job.at;
    Scratch m(at, job.io.dinverse != nullptr);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / at.units, n0 = at.begin(i % at.units), n1 = at.end(i % at.units);
      double* grad = job.gradients ? job.gradients + k * at.square : m.grad.data;
      if (gradient && (job.io.dweight || job.io.dinverse)) job.make_gradient(k, n0, n1, m, grad);
      if (parameters) {
        diagonal_of<T>(job.io.lu, k, m.s.data);
        job.make_parameters(k, n0, n1, m, grad);
      }
    }
  }
};

template <typename T>
void backward(const LUComposeBackward& io, const Launch& on) {
  const LUFactors& lu = io.lu;
  if (lu.count * lu.channels == 0) return;
  const Shape at(lu);
  Buffer<double> gradients(at.units > 1 ? lu.count * at.square : 0);
  BackwardJob<T> job{io, at, at.units > 1 ? gradients.data : nullptr};
  const int64_t cube = lu.channels * lu.channels * lu.channels;
  const int64_t work = io.dinverse ? 3 * cube : cube, units = lu.count * at.units;
  const int64_t grain = 1 + kWork * at.units / (work + 1);
  if (at.units == 1) {
    on.parallel(units, grain, &job, BackwardJob<T>::template body<true, true>);
    return;
  }
  on.parallel(units, grain, &job, BackwardJob<T>::template body<true, false>);
  on.parallel(units, grain, &job, BackwardJob<T>::template body<false, true>);
}

}  // namespace

void lu_compose_forward(const LUComposeForward& io, const Launch& on) {
  io.lu.data == DType::f64 ? forward<double>(io, on) : forward<float>(io, on);
}

void lu_compose_backward(const LUComposeBackward& io, const Launch& on) {
  io.lu.data == DType::f64 ? backward<double>(io, on) : backward<float>(io, on);
}

}  // namespace NF_ISA
}  // namespace nf
