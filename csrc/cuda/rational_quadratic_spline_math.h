// A spline's arithmetic on one element: softmax, bin and gradients, its raw values being in shared memory.
//
// K above 0: that many bins, whose exponentials stay in registers between their sum and the search. K = 0: any number
// of bins, and the exponentials are made again.
#pragma once

#include "rational_quadratic_spline_tile.h"

namespace nf {
namespace cuda {
namespace {

// exp(v / kPerLog<T>) of v <= 0.
template <typename T>
constexpr T kPerLog = T(1);
template <>
constexpr float kPerLog<float> = 1.4426950408889634f;
NF_DEVICE float exp_scaled(float v) { return exp2_quick(v); }
NF_DEVICE double exp_scaled(double v) { return exp_(v); }
NF_DEVICE float greater(float a, float b) { return ::fmaxf(a, b); }
NF_DEVICE double greater(double a, double b) { return ::fmax(a, b); }

// A spline's options as a kernel takes them.
template <typename T>
struct SplineRules {
  SplineConstants<T> c;
  T logit_scale, per_half_clip;
  int bins, slopes;
  SplineSlopes derivatives;
  bool softclip, identity, half_turn, inverse;

  explicit SplineRules(const SplineForm& k)
      : c(spline_constants<T>(k)),
        logit_scale(static_cast<T>(k.numbers.prescale * static_cast<double>(kPerLog<T>))),
        per_half_clip(static_cast<T>(2 / k.numbers.clip)),
        bins(k.bins),
        slopes(k.slopes),
        derivatives(k.derivatives),
        softclip(k.softclip),
        identity(k.identity_outside),
        half_turn(k.half_turn),
        inverse(k.inverse) {}
};

// An element's raw values.
template <DType R, bool planes>
struct RawRow {
  using T = ArithmeticOf<R>;
  StorageType<R>* at;
  int step;  // planes: between values

  NF_DEVICE T operator[](int i) const { return Storage<R>::load(at[planes ? i * step : i]); }
  NF_DEVICE void set(int i, T v) const { at[planes ? i * step : i] = Storage<R>::store(v); }
};

// What the softmax is taken of, times kPerLog. (The reciprocal serves all of the quotient's range but its last binade.)
template <typename T>
NF_DEVICE T scaled_logit(T r, const SplineRules<T>& k) {
  if (!k.softclip) return r * k.logit_scale;
  const T scaled = r * k.c.prescale;
  return scaled * reciprocal_1_2(T(1) + std::fabs(scaled) * k.per_half_clip) * kPerLog<T>;
}

// Exponentials of the logits of an axis (of its bins' widths, or heights), less the greatest, and their sum.
template <typename T, int K>
struct Exponentials {
  T kept[K > 0 ? K : 1];
  T top, sum;

  template <typename Row>
  NF_DEVICE Exponentials(const Row& row, int from, const SplineRules<T>& k) {
    sum = T(0);
    if constexpr (K > 0) {
#pragma unroll
      for (int i = 0; i < K; ++i) kept[i] = row[from + i];
      if (k.softclip) {
#pragma unroll
        for (int i = 0; i < K; ++i) kept[i] = scaled_logit(kept[i], k);
      } else {
#pragma unroll
        for (int i = 0; i < K; ++i) kept[i] *= k.logit_scale;
      }
      top = kept[0];
#pragma unroll
      for (int i = 1; i < K; ++i) top = greater(top, kept[i]);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        kept[i] = exp_scaled(kept[i] - top);
        sum += kept[i];
      }
    } else {
      top = scaled_logit(row[from], k);
#pragma unroll 4
      for (int i = 1; i < k.bins; ++i) top = greater(top, scaled_logit(row[from + i], k));
#pragma unroll 4
      for (int i = 0; i < k.bins; ++i) sum += exp_scaled(scaled_logit(row[from + i], k) - top);
    }
  }

  template <typename Row>
  NF_DEVICE T at(int i, const Row& row, int from, const SplineRules<T>& k) const {
    if constexpr (K > 0)
      return kept[i];
    else
      return exp_scaled(scaled_logit(row[from + i], k) - top);
  }
};

// A sum that keeps what its roundings lost: knots are as good as sums in double.
template <typename T>
struct RunningSum {
  T value, lost = T(0);

  NF_DEVICE explicit RunningSum(T start) : value(start) {}
  NF_DEVICE void add(T v) {
    const T wanted = v - lost, next = value + wanted;
    lost = (next - value) - wanted;
    value = next;
  }
};

// A bin in both directions: `own` is the one that was searched.
template <typename T>
struct FoundBin {
  int index;
  T own, own_size, other, other_size;
};

// The bin of v: ends belong to the last and the first one.
template <int K, typename T, typename Row>
NF_DEVICE FoundBin<T> find_bin(T v, const Exponentials<T, K>& own, const Exponentials<T, K>& other, const Row& row,
                               const SplineRules<T>& k, bool by_y) {
  const int bins = K > 0 ? K : k.bins, from = by_y ? bins : 0, other_from = by_y ? 0 : bins;
  const T span = by_y ? k.c.span_h : k.c.span_w, floor = by_y ? k.c.floor_h : k.c.floor_w;
  const T other_span = by_y ? k.c.span_w : k.c.span_h, other_floor = by_y ? k.c.floor_w : k.c.floor_h;
  const T per = span / own.sum, other_per = other_span / other.sum;
  FoundBin<T> found;
  found.index = 0;
  found.own = by_y ? k.c.bottom : k.c.low;
  found.other = by_y ? k.c.low : k.c.bottom;
  found.own_size = floor + per * own.at(0, row, from, k);
  found.other_size = other_floor + other_per * other.at(0, row, other_from, k);
  RunningSum<T> knot(found.own), other_knot(found.other);
  knot.add(found.own_size);
  other_knot.add(found.other_size);
  const auto step = [&](int i) {
    const T size = floor + per * own.at(i, row, from, k);
    const T other_size = other_floor + other_per * other.at(i, row, other_from, k);
    if (v >= knot.value) found = {i, knot.value, size, other_knot.value, other_size};
    knot.add(size);
    other_knot.add(other_size);
  };
  if constexpr (K > 0) {
#pragma unroll
    for (int i = 1; i < K; ++i) step(i);
  } else {
#pragma unroll 4
    for (int i = 1; i < bins; ++i) step(i);
  }
  return found;
}

// The slope at a knot from its raw value's place; 1 where it has none.
template <typename T, typename Row>
NF_DEVICE T slope_at(int place, const Row& row, const SplineRules<T>& k) {
  const T raw = place < 0 ? T(0) : row[2 * k.bins + place];
  const T slope = k.softclip ? spline_slope<true>(raw, k.c) : spline_slope<false>(raw, k.c);
  return place < 0 ? T(1) : slope;
}

// The value and the log-derivative of one element.
template <int K, typename T, typename Row>
NF_DEVICE SplineValue<T> transform_element(T v, const Row& row, const SplineRules<T>& k) {
  if (k.half_turn && !k.inverse) v = spline_turned(v, k.c);
  const int bins = K > 0 ? K : k.bins;
  const Exponentials<T, K> own(row, k.inverse ? bins : 0, k), other(row, k.inverse ? 0 : bins, k);
  const FoundBin<T> found = find_bin<K>(v, own, other, row, k, k.inverse);
  SplineBin<T> bin{found.own, found.own_size, found.other, found.other_size, T(1), T(1)};
  if (k.inverse) bin = {found.other, found.other_size, found.own, found.own_size, T(1), T(1)};
  bin.d0 = slope_at(spline_first_slope(found.index, k.derivatives), row, k);
  bin.d1 = slope_at(spline_second_slope(found.index, bins, k.derivatives), row, k);
  SplineValue<T> out;
  if (k.inverse)
    out = k.identity ? spline_inverse<true>(v, bin, k.c) : spline_inverse<false>(v, bin, k.c);
  else
    out = k.identity ? spline_forward<true>(v, bin, k.c) : spline_forward<false>(v, bin, k.c);
  if (k.half_turn && k.inverse) out.value = spline_turned(out.value, k.c);
  return out;
}

// From the gradients of the chosen bin's start and size to those of an axis' raw values, in their places.
template <int K, typename T, typename Row>
NF_DEVICE void sizes_gradient(const Exponentials<T, K>& e, const Row& row, int from, int index, T start, T size, T span,
                              const SplineRules<T>& k) {
  const int bins = K > 0 ? K : k.bins;
  const T per = T(1) / e.sum;
  start *= span;
  size *= span;
  T before = T(0), here = T(0);
  const auto add = [&](int i) {
    const T v = e.at(i, row, from, k);
    before += i < index ? v : T(0);
    here = i == index ? v : here;
  };
  T dot = T(0);
  const auto write = [&](int i) {
    const T share = e.at(i, row, from, k) * per;
    T g = share * ((i < index ? start : i == index ? size : T(0)) - dot);
    g *= k.softclip ? spline_logit_derivative<true>(row[from + i], k.c) : k.c.prescale;
    row.set(from + i, g);
  };
  if constexpr (K > 0) {
#pragma unroll
    for (int i = 0; i < K; ++i) add(i);
    dot = (start * before + size * here) * per;
#pragma unroll
    for (int i = 0; i < K; ++i) write(i);
  } else {
#pragma unroll 4
    for (int i = 0; i < bins; ++i) add(i);
    dot = (start * before + size * here) * per;
#pragma unroll 4
    for (int i = 0; i < bins; ++i) write(i);
  }
}

template <typename Row>
NF_DEVICE void clear_row(const Row& row, int from, int to) {
#pragma unroll 4
  for (int i = from; i < to; ++i) row.set(i, 0);
}

// dx of one element; its raw values give way to their gradients (only if they are wanted: `with_params`).
template <int K, typename T, typename Row>
NF_DEVICE T element_gradients(T x, T dy, T dl, const Row& row, const SplineRules<T>& k, bool with_params) {
  if (k.half_turn) x = spline_turned(x, k.c);
  const int bins = K > 0 ? K : k.bins;
  const Exponentials<T, K> widths(row, 0, k), heights(row, bins, k);
  const FoundBin<T> found = find_bin<K>(x, widths, heights, row, k, false);
  const int first = spline_first_slope(found.index, k.derivatives);
  const int second = spline_second_slope(found.index, bins, k.derivatives);
  const SplineBin<T> bin{found.own,        found.own_size,          found.other,
                         found.other_size, slope_at(first, row, k), slope_at(second, row, k)};
  SplineGradient<T> g;
  if (k.inverse)
    g = k.identity ? spline_gradient<true, true>(x, dy, dl, bin, k.c)
                   : spline_gradient<false, true>(x, dy, dl, bin, k.c);
  else
    g = k.identity ? spline_gradient<true, false>(x, dy, dl, bin, k.c)
                   : spline_gradient<false, false>(x, dy, dl, bin, k.c);
  if (!with_params) return g.dx;
  const auto slope_gradient = [&](int place, T by_slope) {
    const T raw = row[2 * bins + (place < 0 ? 0 : place)];
    return by_slope * (k.softclip ? spline_slope_derivative<true>(raw, k.c) : spline_slope_derivative<false>(raw, k.c));
  };
  const T by_first = slope_gradient(first, g.d0), by_second = slope_gradient(second, g.d1);
  clear_row(row, 2 * bins, 2 * bins + k.slopes);
  if (first >= 0) row.set(2 * bins + first, by_first);
  if (second >= 0) row.set(2 * bins + second, by_second);
  sizes_gradient<K>(widths, row, 0, found.index, g.left, g.w, k.c.span_w, k);
  sizes_gradient<K>(heights, row, bins, found.index, g.below, g.h, k.c.span_h, k);
  return g.dx;
}

}  // namespace
}  // namespace cuda
}  // namespace nf
