// W = P (L + I) (U + diag(s)), W^-1 and the sum of log|s| on the CPU, in double, and their gradients.
//
// Products and substitutions are made in blocks (lu_compose_block.h). A unit of work is a matrix, or, of few large
// ones, some of its columns or rows: cut by shape alone, and every number is made in one order, so results do not
// depend on the thread count.

#include "../include/kernels.h"
#include "lu_compose_block.h"

namespace nf {
namespace NF_ISA {
namespace {

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
        for (int64_t n = 0; n < row + kRows && n < ld; n += kGroup)  // the last rows are padding
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
