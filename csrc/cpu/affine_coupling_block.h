// The arithmetic of affine coupling, on blocks of elements at unit stride.
#pragma once

#include "../include/affine_coupling.h"
#include "isa.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int kLane = 16;    // blocks are padded to this
constexpr int kBlock = 256;  // elements per block

template <typename T>
struct Block {
  const T *x, *t, *r, *g, *log_g;  // forward: x; backward: the output y
  T *y, *log_s;                    // forward
  const T *dy, *dlogdet;           // backward, from here on
  T *dx, *dt, *dr, *dg;
};

// The scale map, the layout of the formula and the direction are compile-time: a division that only an inverse needs
// would otherwise be executed, masked, by every forward. `shift_factor` multiplies the raw shift: -1 in an inverse.
template <typename T, MapKind kind, bool plain, bool shift_first, bool invert>
void forward_block(const Block<T>& k, int n, const MapConstants<T>& c, T shift_factor) {
  n &= ~(kLane - 1);
  const T* __restrict x = k.x, * __restrict t = k.t, * __restrict r = k.r, * __restrict g = k.g, * __restrict lg = k.log_g;
  T* __restrict y = k.y, * __restrict ls = k.log_s;
  const MapConstants<T> m = c;
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    const Scale<T> v = scale_of<T, kind, plain>(r[i], g[i], lg[i], m);
    const T s = invert ? T(1) / v.s : v.s;
    const T shift = shift_factor * t[i];
    y[i] = shift_first ? (x[i] + shift) * s : x[i] * s + shift;
    ls[i] = invert ? -v.log_s : v.log_s;
  }
}

template <typename T, MapKind kind, bool plain, bool shift_first, bool invert>
void backward_block(const Block<T>& k, int n, const MapConstants<T>& c, T shift_factor) {
  n &= ~(kLane - 1);
  const T* __restrict y = k.x, * __restrict t = k.t, * __restrict r = k.r, * __restrict g = k.g, * __restrict lg = k.log_g;
  const T* __restrict dy = k.dy, * __restrict dl = k.dlogdet;
  T* __restrict dx = k.dx, * __restrict dt = k.dt, * __restrict dr = k.dr, * __restrict dg = k.dg;
  const MapConstants<T> m = c;
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    const Scale<T> v = scale_of<T, kind, plain>(r[i], g[i], lg[i], m);
    const T s = invert ? T(1) / v.s : v.s;
    const T through = dy[i] * s;
    const T scaled = shift_first ? y[i] : y[i] - shift_factor * t[i];
    const T sum = dy[i] * scaled + dl[i];
    const T dlog = invert ? -sum : sum;
    dx[i] = through;
    dt[i] = shift_factor * (shift_first ? through : dy[i]);
    dr[i] = dlog * v.derivative;
    dg[i] = dlog * v.by_gain;
  }
}

template <typename T>
using BlockFunction = void (*)(const Block<T>&, int, const MapConstants<T>&, T);

template <typename T, bool backward, MapKind kind, bool plain = true>
BlockFunction<T> block_function(bool shift_first, bool invert) {
#define NF_PICK(F)                                                                       \
  (shift_first ? invert ? F<T, kind, plain, true, true> : F<T, kind, plain, true, false> \
   : invert    ? F<T, kind, plain, false, true>                                          \
               : F<T, kind, plain, false, false>)
  if constexpr (backward)
    return NF_PICK(backward_block);
  else
    return NF_PICK(forward_block);
#undef NF_PICK
}

template <typename T, bool backward>
BlockFunction<T> block_function(const Coupling& k) {
  const bool plain = k.constants.eps == 0, first = k.shift_first, invert = k.negate_log;
  switch (k.kind) {
    case MapKind::additive:
      return block_function<T, backward, MapKind::additive>(first, invert);
    case MapKind::exp:
      return block_function<T, backward, MapKind::exp>(first, invert);
    case MapKind::sigmoid:
      return plain ? block_function<T, backward, MapKind::sigmoid, true>(first, invert)
                   : block_function<T, backward, MapKind::sigmoid, false>(first, invert);
    case MapKind::tanh:
      return block_function<T, backward, MapKind::tanh>(first, invert);
    case MapKind::atan:
      return block_function<T, backward, MapKind::atan>(first, invert);
    case MapKind::softplus:
      return plain ? block_function<T, backward, MapKind::softplus, true>(first, invert)
                   : block_function<T, backward, MapKind::softplus, false>(first, invert);
    default:
      return block_function<T, backward, MapKind::softclip>(first, invert);
  }
}

template <typename T>
void fill(T* p, int n, T v) {
  for (int i = 0; i < n; ++i) p[i] = v;
}

template <typename T>
struct Scratch {
  alignas(64) T x[kBlock], t[kBlock], r[kBlock], g[kBlock], log_g[kBlock], y[kBlock], log_s[kBlock];
  alignas(64) T dy[kBlock], dlogdet[kBlock], dx[kBlock], dt[kBlock], dr[kBlock], dg[kBlock];

  Block<T> block() { return {x, t, r, g, log_g, y, log_s, dy, dlogdet, dx, dt, dr, dg}; }

  // No gain, and numbers in what pads a first, short block.
  void quiet() {
    fill(g, kBlock, T(1)), fill(log_g, kBlock, T(0)), fill(dy, kBlock, T(0));
    fill(x, kLane, T(0)), fill(t, kLane, T(0)), fill(r, kLane, T(0));
  }
};

// lanes[l] += the first n values, those of lane l; what pads them is cleared.
template <typename T>
void add_lanes(T* values, int n, T* lanes) {
  const int padded = n < kLane ? kLane : n;
  for (int i = n; i < padded; ++i) values[i] = T(0);
  for (int j = 0; j < padded; j += kLane)
    for (int l = 0; l < kLane; ++l) lanes[l] += values[j + l];
}

// In double and by halves: neither a long chain of additions nor a rounding that shows.
template <typename T>
double sum_lanes(const T* lanes) {
  double sum[kLane];
  for (int l = 0; l < kLane; ++l) sum[l] = lanes[l];
  for (int half = kLane / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  return sum[0];
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
