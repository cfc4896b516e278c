// The arithmetic of rational-quadratic splines on blocks: rows of kTile elements, one row for each raw value.
//
// Softmax, knots and the search for the bin are one running sum; only the slopes of the bin that was found are made.
#pragma once

#include "../include/rational_quadratic_spline.h"
#include "isa.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int kLane = 16;  // blocks are padded to this
constexpr int kFew = 8;    // sums of more are made of sums of so many: their rounding grows with the root of the count
constexpr int kTile = 64;  // elements per block, and the length of a row

// One of the two softmaxes of a block, and what is known of the bin that was found.
template <typename T>
struct Sizes {
  alignas(64) T total[kTile];   // of the exponentials
  alignas(64) T before[kTile];  // the sum of those before the bin
  alignas(64) T chosen[kTile];  // the bin's
  alignas(64) T start[kTile], size[kTile];
};

template <typename T>
struct Block {
  T* raw;     // [count] rows; a backward leaves the gradients there
  T* powers;  // [2 bins] rows: exponentials of widths and heights
  alignas(64) T x[kTile], y[kTile], log[kTile];
  alignas(64) T dy[kTile], dlogdet[kTile], dx[kTile];
  Sizes<T> widths, heights;
  alignas(64) T index[kTile], first[kTile], second[kTile];  // the bin; where its raw slopes are, -1: none
  alignas(64) T raw0[kTile], raw1[kTile], d0[kTile], d1[kTile];
};

// powers = exp(logit - the greatest), and their sum.
template <typename T, bool softclip>
void make_powers(const T* __restrict raw, int bins, int n, const SplineConstants<T>& constants, T* __restrict powers,
                 T* __restrict total) {
  n &= ~(kLane - 1);
  const SplineConstants<T> c = constants;
  alignas(64) T most[kTile], few[kTile];
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) total[i] = few[i] = T(0), most[i] = powers[i] = spline_logit<softclip>(raw[i], c);
  for (int k = 1; k < bins; ++k) {
    const T* __restrict r = raw + k * kTile;
    T* __restrict e = powers + k * kTile;
    NF_INDEPENDENT
    for (int i = 0; i < n; ++i) e[i] = spline_logit<softclip>(r[i], c), most[i] = max_(most[i], e[i]);
  }
  for (int k = 0; k < bins; ++k) {
    T* __restrict e = powers + k * kTile;
    NF_INDEPENDENT
    for (int i = 0; i < n; ++i) e[i] = spline_exp(e[i] - most[i]), few[i] += e[i];
    if ((k + 1) % kFew == 0 || k + 1 == bins) {
      NF_INDEPENDENT
      for (int i = 0; i < n; ++i) total[i] += few[i], few[i] = T(0);
    }
  }
}

// The bin of v, or that of `index`: where it starts and its size.
template <typename T, bool search>
void find_bin(const T* __restrict powers, int bins, int n, T low, T least, T span, const T* __restrict v,
              T* __restrict index, Sizes<T>& sizes) {
  n &= ~(kLane - 1);
  T* __restrict before = sizes.before, * __restrict chosen = sizes.chosen, * __restrict total = sizes.total;
  T* __restrict start = sizes.start, * __restrict size = sizes.size;
  alignas(64) T sum[kTile], few[kTile], scale[kTile];
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    before[i] = sum[i] = T(0), chosen[i] = few[i] = powers[i];
    if (search) scale[i] = span / total[i], index[i] = T(0);
  }
  for (int k = 1; k < bins; ++k) {
    const T* __restrict e = powers + k * kTile;
    const T place = static_cast<T>(k), base = low + place * least;
    NF_INDEPENDENT
    for (int i = 0; i < n; ++i) {
      const T below = sum[i] + few[i];
      const bool beyond = search ? v[i] >= base + scale[i] * below : index[i] >= place;
      before[i] = beyond ? below : before[i];
      chosen[i] = beyond ? e[i] : chosen[i];
      if (search) index[i] = beyond ? place : index[i];
      few[i] += e[i];
    }
    if ((k + 1) % kFew == 0) {
      NF_INDEPENDENT
      for (int i = 0; i < n; ++i) sum[i] += few[i], few[i] = T(0);
    }
  }
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    const T by = T(1) / total[i];
    before[i] *= by;
    chosen[i] *= by;
    start[i] = low + (index[i] * least + span * before[i]);
    size[i] = least + span * chosen[i];
  }
}

template <typename T, bool softclip>
void make_slopes(Block<T>& k, const SplineForm& form, int n, const SplineConstants<T>& constants) {
  n &= ~(kLane - 1);
  const SplineConstants<T> c = constants;
  const T* __restrict raw = k.raw + 2 * form.bins * kTile;
  const T shift = form.derivatives == SplineSlopes::inner ? T(1) : T(0), end = static_cast<T>(form.slopes);
  const T past = form.derivatives == SplineSlopes::inner ? T(-1) : T(0);  // a periodic spline's last slope is its first
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    const T first = k.index[i] - shift, next = first + T(1);
    k.first[i] = first, k.second[i] = next == end ? past : next;
  }
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    k.raw0[i] = raw[static_cast<int>(max_(k.first[i], T(0))) * kTile + i];
    k.raw1[i] = raw[static_cast<int>(max_(k.second[i], T(0))) * kTile + i];
  }
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    k.d0[i] = k.first[i] < T(0) ? T(1) : spline_slope<softclip>(k.raw0[i], c);
    k.d1[i] = k.second[i] < T(0) ? T(1) : spline_slope<softclip>(k.raw1[i], c);
  }
}

template <typename T, bool identity, bool inverse>
void evaluate(Block<T>& k, int n, const SplineConstants<T>& constants) {
  n &= ~(kLane - 1);
  const SplineConstants<T> c = constants;
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    const SplineBin<T> bin{k.widths.start[i], k.widths.size[i], k.heights.start[i],
                           k.heights.size[i], k.d0[i],          k.d1[i]};
    const SplineValue<T> v =
        inverse ? spline_inverse<identity>(k.x[i], bin, c) : spline_forward<identity>(k.x[i], bin, c);
    k.y[i] = v.value, k.log[i] = v.log;
  }
}

// Leaves the gradients of the bin's start and size where those were, and of its slopes in d0 and d1.
template <typename T, bool identity, bool inverse>
void differentiate(Block<T>& k, int n, const SplineConstants<T>& constants) {
  n &= ~(kLane - 1);
  const SplineConstants<T> c = constants;
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    const SplineBin<T> bin{k.widths.start[i], k.widths.size[i], k.heights.start[i],
                           k.heights.size[i], k.d0[i],          k.d1[i]};
    const SplineGradient<T> g = spline_gradient<identity, inverse>(k.x[i], k.dy[i], k.dlogdet[i], bin, c);
    k.dx[i] = g.dx;
    k.widths.start[i] = g.left, k.widths.size[i] = g.w, k.heights.start[i] = g.below, k.heights.size[i] = g.h;
    k.d0[i] = g.d0, k.d1[i] = g.d1;
  }
}

// Through the softmax, from the gradients of the bin's start and size to those of the raw values, in their place.
template <typename T, bool softclip>
void differentiate_sizes(T* raw, const T* powers, int bins, int n, T span, const T* __restrict index, Sizes<T>& sizes,
                         const SplineConstants<T>& constants) {
  n &= ~(kLane - 1);
  const SplineConstants<T> c = constants;
  T* __restrict start = sizes.start, * __restrict size = sizes.size, * __restrict scale = sizes.total;
  alignas(64) T dot[kTile];
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    start[i] *= span, size[i] *= span;
    dot[i] = start[i] * sizes.before[i] + size[i] * sizes.chosen[i];
    scale[i] = T(1) / scale[i];
  }
  for (int k = 0; k < bins; ++k) {
    T* __restrict r = raw + k * kTile;
    const T* __restrict e = powers + k * kTile;
    const T place = static_cast<T>(k);
    NF_INDEPENDENT
    for (int i = 0; i < n; ++i) {
      const T g = index[i] > place ? start[i] : (index[i] == place ? size[i] : T(0));
      r[i] = e[i] * scale[i] * (g - dot[i]) * spline_logit_derivative<softclip>(r[i], c);
    }
  }
}

template <typename T, bool softclip>
void differentiate_slopes(Block<T>& k, const SplineForm& form, int n, const SplineConstants<T>& constants) {
  n &= ~(kLane - 1);
  const SplineConstants<T> c = constants;
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    k.d0[i] *= spline_slope_derivative<softclip>(k.raw0[i], c);
    k.d1[i] *= spline_slope_derivative<softclip>(k.raw1[i], c);
  }
  for (int j = 0; j < form.slopes; ++j) {
    T* __restrict r = k.raw + (2 * form.bins + j) * kTile;
    const T place = static_cast<T>(j);
    NF_INDEPENDENT
    for (int i = 0; i < n; ++i) r[i] = (k.first[i] == place ? k.d0[i] : T(0)) + (k.second[i] == place ? k.d1[i] : T(0));
  }
}

template <typename T>
void turn(T* x, int n, const SplineConstants<T>& constants) {
  n &= ~(kLane - 1);
  const SplineConstants<T> c = constants;
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) x[i] = spline_turned(x[i], c);
}

template <typename T, bool softclip>
void read_bin(Block<T>& k, const SplineForm& form, int n, const SplineConstants<T>& c, bool by_y) {
  const int bins = form.bins;
  T* heights = k.powers + bins * kTile;
  make_powers<T, softclip>(k.raw, bins, n, c, k.powers, k.widths.total);
  make_powers<T, softclip>(k.raw + bins * kTile, bins, n, c, heights, k.heights.total);
  if (by_y) {
    find_bin<T, true>(heights, bins, n, c.bottom, c.floor_h, c.span_h, k.x, k.index, k.heights);
    find_bin<T, false>(k.powers, bins, n, c.low, c.floor_w, c.span_w, k.x, k.index, k.widths);
  } else {
    find_bin<T, true>(k.powers, bins, n, c.low, c.floor_w, c.span_w, k.x, k.index, k.widths);
    find_bin<T, false>(heights, bins, n, c.bottom, c.floor_h, c.span_h, k.x, k.index, k.heights);
  }
  make_slopes<T, softclip>(k, form, n, c);
}

// y and log from x and raw.
template <typename T, bool softclip>
void forward_block(Block<T>& k, const SplineForm& form, int n, const SplineConstants<T>& c) {
  if (form.half_turn && !form.inverse) turn(k.x, n, c);
  read_bin<T, softclip>(k, form, n, c, form.inverse);
  if (form.identity_outside)
    form.inverse ? evaluate<T, true, true>(k, n, c) : evaluate<T, true, false>(k, n, c);
  else
    form.inverse ? evaluate<T, false, true>(k, n, c) : evaluate<T, false, false>(k, n, c);
  if (form.half_turn && form.inverse) turn(k.y, n, c);
}

// dx and, in the place of raw, dparams, from the spline's x, raw, dy and dlogdet.
template <typename T, bool softclip>
void backward_block(Block<T>& k, const SplineForm& form, int n, const SplineConstants<T>& c, bool need_dparams) {
  if (form.half_turn) turn(k.x, n, c);
  read_bin<T, softclip>(k, form, n, c, false);
  if (form.identity_outside)
    form.inverse ? differentiate<T, true, true>(k, n, c) : differentiate<T, true, false>(k, n, c);
  else
    form.inverse ? differentiate<T, false, true>(k, n, c) : differentiate<T, false, false>(k, n, c);
  if (!need_dparams) return;
  const int bins = form.bins;
  differentiate_sizes<T, softclip>(k.raw, k.powers, bins, n, c.span_w, k.index, k.widths, c);
  differentiate_sizes<T, softclip>(k.raw + bins * kTile, k.powers + bins * kTile, bins, n, c.span_h, k.index, k.heights,
                                   c);
  differentiate_slopes<T, softclip>(k, form, n, c);
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
