// What a rational-quadratic spline is, to every kernel, and its scalar maths. The formulas are those of
// nfkernels/reference/rational_quadratic_spline.py, where every term is positive: nothing cancels, no discriminant is
// negative and no quotient is 0 / 0. Free of branches, so that a plain loop over elements vectorises.
#pragma once

#include "scale_map.h"
#include "types.h"

namespace nf {

enum class SplineSlopes : int { inner = 0, periodic = 1, all = 2 };  // K - 1, K, K + 1 of them

constexpr int kSplineMostBins = 64;

struct SplineNumbers {
  double low, high, bottom, top, min_width, min_height, min_derivative, clip, prescale;
};

struct SplineForm {
  int bins, slopes;  // K, and raw slopes per element
  SplineSlopes derivatives;
  bool softclip, identity_outside, half_turn, inverse, elementwise;
  SplineNumbers numbers;
  DType data, raw;  // of x and of params
  int64_t batch, channels, positions;
  int64_t transformed;         // channels that have params
  const int64_t* channel_map;  // [channels]: the place among them or -1; or null
  View mask;                   // bool, true where transformed; data null: everywhere

  int count() const { return 2 * bins + slopes; }  // params channels per transformed channel
  // The place among params' channels (in steps of count()) of data channel c, or -1 where c passes through.
  int64_t source(int64_t c) const {
    if (!channel_map) return c;
    const int64_t j = channel_map[c];
    return j >= 0 && j < transformed ? j : -1;
  }
};

inline void unpack_form(SplineForm& k, int64_t bins, int64_t bits) {
  k.bins = static_cast<int>(bins);
  k.derivatives = static_cast<SplineSlopes>(bits & 3);
  k.slopes = k.bins - 1 + static_cast<int>(k.derivatives);
  k.softclip = bits & 4;
  k.identity_outside = bits & 8;
  k.half_turn = bits & 16;
  k.inverse = bits & 32;
  k.elementwise = bits & 64;
}

struct SplineForward {
  View x, params, y;
  View each;              // elementwise: log-derivatives, in the arithmetic's type
  const void* logdet_in;  // running log-determinant or null
  int64_t logdet_in_stride;
  void* logdet;  // [batch], or null where elementwise
};

struct SplineBackward {
  View x, params;  // x: the spline's own x, so an inverse's output
  View dy;         // data null: zero
  View dlogdet;    // in the arithmetic's type; strides of c and p are 0 unless elementwise; data null: zero
  View dx;         // data null: not wanted
  View dparams;    // data null: not wanted
};

namespace {

template <typename T>
struct SplineConstants {
  T low, high, bottom, top;
  T length;           // of x's interval
  T floor_w, span_w;  // a bin's width is floor + span * share
  T floor_h, span_h;
  T min_derivative, clip, half_clip, prescale;
};

template <typename T>
SplineConstants<T> spline_constants(const SplineForm& k) {
  const SplineNumbers& n = k.numbers;
  const double w = n.high - n.low, h = n.top - n.bottom;
  return {T(n.low),
          T(n.high),
          T(n.bottom),
          T(n.top),
          T(w),
          T(w * n.min_width),
          T(w * (1 - k.bins * n.min_width)),
          T(h * n.min_height),
          T(h * (1 - k.bins * n.min_height)),
          T(n.min_derivative),
          T(n.clip),
          T(n.clip / 2),
          T(n.prescale)};
}

// Gives back v where it is NaN.
template <typename T>
NF_FN T unit_(T v) {
  v = v < T(0) ? T(0) : v;
  return v > T(1) ? T(1) : v;
}

NF_FN float sqrt_(float v) { return ::sqrtf(v); }
NF_FN double sqrt_(double v) { return ::sqrt(v); }
NF_FN float floor_(float v) { return ::floorf(v); }
NF_FN double floor_(double v) { return ::floor(v); }

// --- raw values ------------------------------------------------------------------------------------------------------

template <typename T>
NF_FN T spline_clip(T r, T c) {
  return r / (T(1) + std::fabs(r) / c);
}

template <typename T>
NF_FN T spline_clip_derivative(T r, T c) {
  const T q = T(1) + std::fabs(r) / c;
  return T(1) / (q * q);
}

// What the softmax of widths and heights is taken of, and its derivative.
template <bool softclip, typename T>
NF_FN T spline_logit(T r, const SplineConstants<T>& c) {
  const T scaled = r * c.prescale;
  return softclip ? spline_clip(scaled, c.half_clip) : scaled;
}

template <bool softclip, typename T>
NF_FN T spline_logit_derivative(T r, const SplineConstants<T>& c) {
  return softclip ? spline_clip_derivative(r * c.prescale, c.half_clip) * c.prescale : c.prescale;
}

// exp of a logit less the greatest one. What is smaller than the least normal number beside 1 may be that: a power of
// two is then one factor.
NF_FN float spline_exp(float d) {
#ifdef __CUDA_ARCH__
  return ::expf(d);
#else
  return exp_normal(d < -87.0f ? -87.0f : d);
#endif
}
NF_FN double spline_exp(double d) { return exp_(d); }

// A knot's slope, and its derivative by the raw value.
template <bool softclip, typename T>
NF_FN T spline_slope(T r, const SplineConstants<T>& c) {
  if constexpr (softclip) return exp_(spline_clip(r, c.clip));
  return c.min_derivative + (max_(r, T(0)) + log1p_unit(exp_minus_abs(r)));
}

template <bool softclip, typename T>
NF_FN T spline_slope_derivative(T r, const SplineConstants<T>& c) {
  if constexpr (softclip) return exp_(spline_clip(r, c.clip)) * spline_clip_derivative(r, c.clip);
  const T u = exp_minus_abs(r);
  return (r >= T(0) ? T(1) : u) / (T(1) + u);
}

// Where among an element's raw slopes those of bin i's two knots are; -1: that slope is 1.
NF_FN int spline_first_slope(int i, SplineSlopes d) { return d == SplineSlopes::inner ? i - 1 : i; }
NF_FN int spline_second_slope(int i, int bins, SplineSlopes d) {
  if (d == SplineSlopes::inner) return i < bins - 1 ? i : -1;
  return d == SplineSlopes::periodic && i == bins - 1 ? 0 : i + 1;
}

// Half a turn on, modulo the interval.
template <typename T>
NF_FN T spline_turned(T x, const SplineConstants<T>& c) {
  const T from = x - c.low + c.length / T(2);
  T t = from - floor_(from / c.length) * c.length;
  // The quotient may have been rounded across a whole number.
  t = t < T(0) ? t + c.length : t;
  t = t >= c.length ? t - c.length : t;
  return c.low + t;
}

// --- in a bin --------------------------------------------------------------------------------------------------------

template <typename T>
struct SplineBin {
  T x, w, y, h, d0, d1;  // left end and width, lower end and height, the slopes there
};

template <typename T>
struct SplineValue {
  T value, log;  // y (or x) and the logarithm of its derivative
};

// log y' at a = (x - x_k) / w, b = 1 - a, in a bin of slope s.
template <typename T>
NF_FN T spline_log_slope(T a, T b, T s, T d0, T d1) {
  const T ab = a * b;
  const T total = s * (a * a + b * b) + (d0 + d1) * ab;
  const T among = d1 * a * a + T(2) * s * ab + d0 * b * b;
  return T(2) * log_(s / total) + log_(among);
}

// `identity`: outside of the interval the identity, else straight on.
template <bool identity, typename T>
NF_FN SplineValue<T> spline_forward(T x, const SplineBin<T>& k, const SplineConstants<T>& c) {
  const T s = k.h / k.w;
  const T a = unit_((x - k.x) / k.w), b = T(1) - a;
  const T ab = a * b;
  const T total = s * (a * a + b * b) + (k.d0 + k.d1) * ab;
  const T among = k.d1 * a * a + T(2) * s * ab + k.d0 * b * b;
  const bool before = x<c.low, after = x> c.high;
  T value = k.y + k.h * (a * (s * a + k.d0 * b) / total);
  // Outside, a is 0 or 1 and the slope is the end's: straight on needs no logarithm of its own.
  T log = T(2) * log_(s / total) + log_(among);
  if constexpr (identity) {
    value = before || after ? x : value;
    log = before || after ? T(0) : log;
  } else {
    value = before ? c.bottom + (x - c.low) * k.d0 : value;
    value = after ? c.top + (x - c.high) * k.d1 : value;
  }
  return {value, log};
}

template <bool identity, typename T>
NF_FN SplineValue<T> spline_inverse(T y, const SplineBin<T>& k, const SplineConstants<T>& c) {
  const T s = k.h / k.w;
  const T e = unit_((y - k.y) / k.h), f = unit_((k.y + k.h - y) / k.h);
  const T u = k.d0 * f - k.d1 * e, q = T(4) * s * s * e * f;
  const T larger = sqrt_(u * u + q) + std::fabs(u);  // of the roots of the two quadratics, for a and for b
  const T smaller = q / larger;
  const T se = T(2) * s * e, sf = T(2) * s * f;
  const T a = se / ((u >= T(0) ? larger : smaller) + se), b = sf / ((u >= T(0) ? smaller : larger) + sf);
  const bool before = y<c.bottom, after = y> c.top;
  T value = k.x + k.w * a, log = -spline_log_slope(a, b, s, k.d0, k.d1);
  if constexpr (identity) {
    value = before || after ? y : value;
    log = before || after ? T(0) : log;
  } else {
    value = before ? c.low + (y - c.bottom) / k.d0 : value;
    value = after ? c.high + (y - c.top) / k.d1 : value;
  }
  return {value, log};
}

template <typename T>
struct SplineGradient {
  T dx;
  T left, w, below, h;  // of the bin's ends and sizes
  T d0, d1;             // of the slopes there
};

// From the gradients of the result and of its log-derivative. x is the spline's own, so an inverse's result.
template <bool identity, bool inverse, typename T>
NF_FN SplineGradient<T> spline_gradient(T x, T dy, T dl, const SplineBin<T>& k, const SplineConstants<T>& c) {
  const T iw = T(1) / k.w;
  const T s = k.h * iw;
  const T a = unit_((x - k.x) * iw), b = T(1) - a;
  const T ab = a * b, aa = a * a, bb = b * b;
  const T ends = k.d0 + k.d1;
  const T total = s * (aa + bb) + ends * ab;
  const T among = k.d1 * aa + T(2) * s * ab + k.d0 * bb;
  const T it = T(1) / total, im = T(1) / among;
  const T e = a * (s * a + k.d0 * b) * it, f = b * (s * b + k.d1 * a) * it;
  const bool before = x<c.low, after = x> c.high, outside = before || after;
  const T st = s * it;
  const T tail = before ? k.d0 : k.d1;
  T slope = st * st * among;
  // of the log-derivative, by x
  T bend = T(2) * ((k.d1 * a + s * (b - a) - k.d0 * b) * im - (b - a) * (ends - T(2) * s) * it) * iw;
  slope = outside ? (identity ? T(1) : tail) : slope;
  bend = outside ? T(0) : bend;
  // An inverse's, by the implicit function theorem, are the forward's from these two.
  const T gl = inverse ? -dl : dl;
  const T gy = inverse ? -(dy + gl * bend) / slope : dy;
  const T gx = gy * slope + gl * bend;
  SplineGradient<T> g;
  g.dx = inverse ? -gy : gx;
  const T gs =
      gy * k.h * ab * (k.d1 * aa - k.d0 * bb) * it * it + gl * (T(2) / s + T(2) * ab * im - T(2) * (aa + bb) * it);
  g.d0 = gy * k.h * ab * f * it + gl * (bb * im - T(2) * ab * it);
  g.d1 = -gy * k.h * ab * e * it + gl * (aa * im - T(2) * ab * it);
  g.left = outside ? T(0) : -gx;
  g.w = outside ? T(0) : -(gx * a + gs * s * iw);
  g.below = outside ? T(0) : gy;
  g.h = outside ? T(0) : gy * e + gs * iw;
  if constexpr (identity) {
    g.d0 = outside ? T(0) : g.d0;
    g.d1 = outside ? T(0) : g.d1;
  } else {  // y = start + (x - low) d
    const T along = gy * (before ? x - c.low : x - c.high) + gl / tail;
    g.d0 = before ? along : (after ? T(0) : g.d0);
    g.d1 = after ? along : (before ? T(0) : g.d1);
  }
  return g;
}

}  // namespace
}  // namespace nf
