// The scale maps of affine couplings: raw conditioner output -> scale, its logarithm and derivatives.
// One table for every kernel; the formulas are those of nfkernels/reference/scale_map.py.
#pragma once

#include "scalar_math.h"

namespace nf {

enum class MapKind : int { additive = 0, exp, sigmoid, tanh, atan, softplus, softclip };

struct ScaleMapConstants {
  double prescale, offset, gain, clamp, eps;
};

namespace {

// What a kernel needs of one element. `derivative` is d log s / d r, `by_gain` is d log s / d (gain tensor).
template <typename T>
struct Scale {
  T s, log_s, derivative, by_gain;
};

template <typename T>
struct MapConstants {
  T prescale, offset, gain, clamp, eps, log_gain, log_clamp;
};

template <typename T>
MapConstants<T> map_constants(const ScaleMapConstants& c) {
  return {T(c.prescale),       T(c.offset), T(c.gain), T(c.clamp), T(c.eps), T(c.gain > 0 ? std::log(c.gain) : 0.0),
          T(std::log(c.clamp))};
}

// Both give back a where it is NaN: a clamp never swallows one.
template <typename T>
NF_FN T min_(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
NF_FN T max_(T a, T b) {
  return a < b ? b : a;
}

// `g` is this channel's learned gain (1 where there is none), `log_g` its logarithm.
// Whatever a caller does not use of the result is dead code to the compiler.
// `plain`: eps is 0, where sigmoid and softplus have closed logarithms that cannot underflow.
template <typename T, MapKind kind, bool plain>
NF_FN Scale<T> scale_of(T r, T g, T log_g, const MapConstants<T>& c) {
  const T a = r * c.prescale + c.offset;
  const T k = c.gain * g;
  Scale<T> out;
  if constexpr (kind == MapKind::additive) {
    out = {T(1), T(0), T(0), T(0)};
  } else if constexpr (kind == MapKind::exp) {
    const T value = min_(max_(a, -c.clamp), c.clamp);
    out.log_s = k * value;
    out.s = exp_(out.log_s);
    out.derivative = (std::fabs(a) <= c.clamp ? k : T(0)) * c.prescale;
    out.by_gain = c.gain * value;
  } else if constexpr (kind == MapKind::tanh) {
    const T value = c.clamp * tanh_(a);
    const T u = exp_minus_abs(T(2) * a);
    const T q = reciprocal_1_2(T(1) + u);
    out.log_s = k * value;
    out.s = exp_(out.log_s);
    out.derivative = k * (c.clamp * (T(4) * u * (q * q))) * c.prescale;
    out.by_gain = c.gain * value;
  } else if constexpr (kind == MapKind::atan) {
    const T value = c.clamp * atan_(a);
    out.log_s = k * value;
    out.s = exp_(out.log_s);
    out.derivative = k * (c.clamp / (T(1) + a * a)) * c.prescale;
    out.by_gain = c.gain * value;
  } else if constexpr (kind == MapKind::softclip) {
    const T q = T(1) + std::fabs(a) / c.clamp;
    out.log_s = k * (a / q);
    out.s = exp_(out.log_s);
    out.derivative = k / (q * q) * c.prescale;
    out.by_gain = c.gain * (a / q);
  } else if constexpr (kind == MapKind::sigmoid) {
    const T u = exp_minus_abs(a);
    const T high = reciprocal_1_2(T(1) + u), low = u * high;
    const bool positive = a >= T(0);
    const T p = positive ? high : low, rest = positive ? low : high;  // sigmoid(a), sigmoid(-a)
    out.s = k * p + c.eps;
    if constexpr (plain) {
      out.log_s = (min_(a, T(0)) - log1p_unit(u)) + (c.log_gain + log_g);
      out.derivative = rest * c.prescale;
      out.by_gain = T(1) / g;
    } else {
      out.log_s = log_(out.s);
      out.derivative = k * p * rest / out.s * c.prescale;
      out.by_gain = c.gain * p / out.s;
    }
  } else if constexpr (kind == MapKind::softplus) {
    const T u = exp_minus_abs(a);
    const T value = max_(a, T(0)) + log1p_unit(u);
    const T p = (a >= T(0) ? T(1) : u) * reciprocal_1_2(T(1) + u);
    const T free = k * value + c.eps;
    const bool inside = free <= c.clamp;
    if constexpr (plain) {
      const bool tail = a < T(-15);  // softplus(a) = e^a (1 - e^a / 2 ...) to working precision
      const T series = a - u / T(2) + T(5) * u * u / T(24);
      out.log_s = (tail ? series : log_(value)) + (c.log_gain + log_g);
      out.derivative = tail ? T(1) - u / T(2) : p / value;
      out.by_gain = T(1) / g;
    } else {
      out.log_s = log_(free);
      out.derivative = k * p / free;
      out.by_gain = c.gain * value / free;
    }
    out.log_s = min_(out.log_s, c.log_clamp);
    out.s = min_(free, c.clamp);
    out.derivative = (inside ? out.derivative : T(0)) * c.prescale;
    out.by_gain = inside ? out.by_gain : T(0);
  }
  return out;
}

}  // namespace
}  // namespace nf
