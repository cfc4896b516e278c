// Dequantisation: whole grey levels and Philox noise to v in [0, 1), and on to the logit where one is asked for.
// The formulas are those of nfkernels/reference/dequantize.py.
#pragma once

#include "philox.h"
#include "types.h"

namespace nf {

struct DequantizeForward {
  bool bytes;  // x is uint8; else it has y's type
  DType data;  // of y
  int64_t batch, channels, positions;
  View x, y;
  const int64_t* key;     // [seed, offset]
  const void* logdet_in;  // running log-determinant or null, in the arithmetic's type
  int64_t logdet_in_stride;
  void* logdet;
  double levels, alpha;  // alpha < 0: no logit
};

struct DequantizeBackward {
  DType data;
  int64_t batch, channels, positions;
  View y, dy, dx;       // dy.data null: zero
  const void* dlogdet;  // null: zero
  int64_t dlogdet_stride;
  double levels, alpha;
};

struct PhiloxUniform {
  DType data;  // f32 or f64
  int64_t batch, channels, positions;
  View y;
  const int64_t* key;
};

template <typename T>
struct GreyConstants {
  T levels, inverse, limit;  // 1 / levels; the largest v
  T alpha, span, log_span;   // w = alpha + span v
  T slope;                   // dv / dx, or of the logit dw / dx
};

// The largest number below 1 that y can hold: a logit's v stays in the arithmetic's type.
inline double largest_unit(DType data, bool logit) {
  if (data == DType::f64) return 1 - 1.1102230246251565e-16;
  if (data == DType::f32 || logit) return 1 - 5.9604644775390625e-8;
  return data == DType::bf16 ? 1 - 0.00390625 : 1 - 0.00048828125;
}

template <typename T>
GreyConstants<T> grey_constants(double levels, double alpha, DType data) {
  const bool logit = alpha >= 0;
  const double span = logit ? 1 - 2 * alpha : 1;
  return {T(levels),         T(1 / levels),   T(largest_unit(data, logit)), T(logit ? alpha : 0), T(span),
          T(std::log(span)), T(span / levels)};
}

namespace {

NF_FN float nudge(float v, int ulps) { return from_bits(to_bits(v) + ulps); }

NF_FN double nudge(double v, int ulps) {
  int64_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits += ulps;
  std::memcpy(&v, &bits, sizeof bits);
  return v;
}

// v = (x + u) / levels. Rounding must not carry v into a neighbour's grey level, so that floor(v * levels) is x again:
// for 2 to 256 levels one unit in the last place up or two down undo it. NaN stays.
template <typename T>
NF_FN T unit_of(T x, T u, const GreyConstants<T>& k) {
  const T v = (x + u) * k.inverse, back = v * k.levels;
  const T kept = nudge(v, (back < x ? 1 : 0) - (back >= x + T(1) ? 2 : 0));
  return kept > k.limit ? k.limit : kept;
}

template <typename T>
struct Logit {
  T y, log_slope;  // log dy/dv
};

// 1 - w comes from 1 - v, which is exact where w is near 1.
template <typename T>
NF_FN Logit<T> logit_of(T v, const GreyConstants<T>& k) {
  const T a = log_(k.alpha + k.span * v), b = log_(k.alpha + k.span * (T(1) - v));
  return {a - b, k.log_span - a - b};
}

// dx of the logit, from its output: dw/dx (dy + dlogdet (2w - 1)) / (w (1 - w)), without a division.
template <typename T>
NF_FN T logit_gradient(T y, T dy, T dlogdet, const GreyConstants<T>& k) {
  const T up = exp_(y < T(0) ? -y : y), down = exp_minus_abs(y);
  return k.slope * (dy * (T(2) + (up + down)) + (y < T(0) ? -dlogdet : dlogdet) * (up - down));
}

}  // namespace
}  // namespace nf
