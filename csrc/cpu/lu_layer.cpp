// A whole LU layer on the CPU: packed triangles unpacked, the linear map (lu_linear.cpp), the log-determinant.

#include "../include/lu_layer.h"

#include "mix_tile.h"

namespace nf {
namespace NF_ISA {

void lu_linear_forward(const LULinearForward&, const Launch&);
void lu_linear_backward(const LULinearBackward&, const Launch&);

namespace {

// Calls f(place in the packed triangle, place in the matrix).
template <typename F>
void each_of_triangle(int64_t n, bool upper, F&& f) {
  int64_t at = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = upper ? i + 1 : 0; j < (upper ? n : i); ++j) f(at++, i * n + j);
}

// A factor as a matrix: itself, or made here.
template <typename T>
struct Dense {
  Buffer<T> made;
  const void* data;

  Dense(const void* factor, bool packed, bool upper, int64_t n) : made(packed ? n * n : 0), data(factor) {
    if (!packed) return;
    const T* from = static_cast<const T*>(factor);
    each_of_triangle(n, upper, [&](int64_t at, int64_t to) { made.data[to] = from[at]; });
    data = made.data;
  }
};

// Where a gradient is written: in place, or made as a matrix of which the triangle is taken (of one channel it is
// empty).
template <typename T>
struct Gradient {
  Buffer<T> made;
  T* out;
  bool wanted, packed, upper;
  int64_t n;

  Gradient(void* to, bool is_wanted, bool is_packed, bool is_upper, int64_t channels)
      : made(is_wanted && is_packed ? channels * channels : 0),
        out(static_cast<T*>(to)),
        wanted(is_wanted),
        packed(is_packed),
        upper(is_upper),
        n(channels) {}
  T* target() { return wanted && packed ? made.data : out; }
  void finish() {
    if (wanted && packed) each_of_triangle(n, upper, [&](int64_t at, int64_t from) { out[at] = made.data[from]; });
  }
};

template <typename T>
void forward(const LULayerForward& k, const Launch& on) {
  LULinearForward linear = k.linear;
  const int64_t n = linear.lu.channels;
  const Dense<T> lower(linear.lu.lower, k.lower_packed, false, n), upper(linear.lu.upper, k.upper_packed, true, n);
  linear.lu.lower = lower.data;
  linear.lu.upper = upper.data;
  lu_linear_forward(linear, on);
  const T* raw = static_cast<const T*>(linear.lu.log_s);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i)
    sum += diagonal_log(linear.lu.diagonal, raw[i], diagonal_value(linear.lu.diagonal, raw[i], 1.0, linear.lu.eps));
  const T logdet = static_cast<T>((linear.inverse ? -sum : sum) * linear.positions);
  for (int64_t b = 0; b < linear.batch; ++b) static_cast<T*>(k.logdet)[b] = logdet;
}

template <typename T>
void backward(const LULayerBackward& k, const Launch& on) {
  LULinearBackward linear = k.linear;
  const int64_t n = linear.lu.channels;
  const Dense<T> lower(linear.lu.lower, k.lower_packed, false, n), upper(linear.lu.upper, k.upper_packed, true, n);
  const bool wanted = linear.dlog_s != nullptr;
  Gradient<T> dlower(linear.dlower, wanted, k.lower_packed, false, n),
      dupper(linear.dupper, wanted, k.upper_packed, true, n);
  linear.lu.lower = lower.data;
  linear.lu.upper = upper.data;
  linear.dlower = dlower.target();
  linear.dupper = dupper.target();
  lu_linear_backward(linear, on);
  dlower.finish();
  dupper.finish();
  if (!k.dlogdet || !linear.dlog_s) return;
  double sum = 0;
  for (int64_t b = 0; b < linear.batch; ++b) sum += static_cast<const T*>(k.dlogdet)[b * k.dlogdet_stride];
  sum *= linear.inverse ? -linear.positions : linear.positions;
  const T* raw = static_cast<const T*>(linear.lu.log_s);
  T* dlog_s = static_cast<T*>(linear.dlog_s);
  for (int64_t i = 0; i < n; ++i) {
    double slope = sum;  // of log|s| by its raw parameter
    if (linear.lu.diagonal == Diagonal::softplus) {
      const double s = diagonal_value(linear.lu.diagonal, raw[i], 1.0, linear.lu.eps);
      slope *= diagonal_slope(linear.lu.diagonal, raw[i], s) / s;
    }
    dlog_s[i] += static_cast<T>(slope);
  }
}

}  // namespace

void lu_layer_forward(const LULayerForward& k, const Launch& on) {
  k.linear.data == DType::f64 ? forward<double>(k, on) : forward<float>(k, on);
}

void lu_layer_backward(const LULayerBackward& k, const Launch& on) {
  k.linear.data == DType::f64 ? backward<double>(k, on) : backward<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
