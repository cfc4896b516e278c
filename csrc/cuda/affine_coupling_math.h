// The arithmetic of affine coupling on values in registers, and what its kernels share.
#pragma once

#include "../include/affine_coupling.h"
#include "storage.h"

namespace nf {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <DType d>
using ArithmeticOf = std::conditional_t<d == DType::f64, double, float>;

// A coupling's options as a kernel takes them.
template <typename T>
struct Formula {
  MapKind kind;
  bool plain, has_scale, has_gain;
  bool shift_first, invert;
  T shift_factor;
  MapConstants<T> constants;

  explicit Formula(const Coupling& k)
      : kind(k.kind),
        plain(k.constants.eps == 0),
        has_scale(k.has_scale()),
        has_gain(k.gain != nullptr),
        shift_first(k.shift_first),
        invert(k.negate_log),
        shift_factor(T(k.shift_factor())),
        constants(map_constants<T>(k.constants)) {}
};

// n / d without a division, for n and d below 2^31.
struct Divider {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(static_cast<uint32_t>(d < 1 ? 1 : d)) {
    if (divisor == 1) return;
    uint32_t log = 1;
    while ((uint64_t{1} << log) < divisor) ++log;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + log)) + divisor - 1) / divisor);
    shift = log - 1;
  }
  NF_DEVICE uint32_t operator()(uint32_t n) const {
    return divisor == 1 ? n : static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> 32) >> shift;
  }
};

template <MapKind k, bool p>
struct Map {
  static constexpr MapKind kind = k;
  static constexpr bool plain = p;
};

// The switch over maps stands outside the loops over elements.
template <typename T, typename F>
NF_DEVICE void with_map(const Formula<T>& f, F&& body) {
  switch (f.kind) {
    case MapKind::additive:
      return body(Map<MapKind::additive, true>{});
    case MapKind::exp:
      return body(Map<MapKind::exp, true>{});
    case MapKind::sigmoid:
      return f.plain ? body(Map<MapKind::sigmoid, true>{}) : body(Map<MapKind::sigmoid, false>{});
    case MapKind::tanh:
      return body(Map<MapKind::tanh, true>{});
    case MapKind::atan:
      return body(Map<MapKind::atan, true>{});
    case MapKind::softplus:
      return f.plain ? body(Map<MapKind::softplus, true>{}) : body(Map<MapKind::softplus, false>{});
    default:
      return body(Map<MapKind::softclip, true>{});
  }
}

// The gains of N elements: one each, or one for all of them.
template <typename T, int N>
struct Gains {
  T g[N], log_g[N];

  NF_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = T(1), log_g[i] = T(0);
  }
  NF_DEVICE void set(int i, T gain) {
    g[i] = gain;
    log_g[i] = log_(gain);
  }
};

// x becomes y; log_s is written.
template <int N, int NG, typename T>
NF_DEVICE void transform(const Formula<T>& f, T (&x)[N], const T (&t)[N], const T (&r)[N], const Gains<T, NG>& gains,
                         T (&log_s)[N]) {
  T s[N];
  with_map(f, [&](auto map) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int ig = NG == 1 ? 0 : i;
      const Scale<T> v =
          scale_of<T, decltype(map)::kind, decltype(map)::plain>(r[i], gains.g[ig], gains.log_g[ig], f.constants);
      s[i] = v.s;
      log_s[i] = v.log_s;
    }
  });
  if (f.invert) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      s[i] = T(1) / s[i];
      log_s[i] = -log_s[i];
    }
  }
  if (f.shift_first) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = (x[i] + f.shift_factor * t[i]) * s[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = x[i] * s[i] + f.shift_factor * t[i];
  }
}

// What the backward reads of N elements, and what it makes of them in the same places: y becomes the rebuilt x, dy
// becomes dx, t becomes dt, r becomes dr. Returns the sum of the dgain of elements whose bit is in `live`.
template <bool with_gain, int N, int NG, typename T>
NF_DEVICE T gradients(const Formula<T>& f, bool rebuild, T (&y)[N], T (&dy)[N], T (&t)[N], T (&r)[N],
                      const T (&dlogdet)[NG], const Gains<T, 1>& gains, uint32_t live) {
  T u[N], s[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T scaled = f.shift_first ? y[i] : y[i] - f.shift_factor * t[i];
    const T sum = dy[i] * scaled + dlogdet[NG == 1 ? 0 : i];
    u[i] = f.invert ? -sum : sum;
  }
  T dgain = T(0);
  with_map(f, [&](auto map) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Scale<T> v =
          scale_of<T, decltype(map)::kind, decltype(map)::plain>(r[i], gains.g[0], gains.log_g[0], f.constants);
      s[i] = v.s;
      r[i] = u[i] * v.derivative;
      if (with_gain && (live >> i & 1)) dgain += u[i] * v.by_gain;
    }
  });
  if (f.invert || rebuild) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T inverse = T(1) / s[i];
      const T back = f.invert ? s[i] : inverse;
      if (f.invert) s[i] = inverse;
      y[i] = f.shift_first ? y[i] * back - f.shift_factor * t[i] : (y[i] - f.shift_factor * t[i]) * back;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T through = dy[i] * s[i];
    t[i] = f.shift_factor * (f.shift_first ? through : dy[i]);
    dy[i] = through;
  }
  return dgain;
}

// The sum over a team of 2^log_team threads that starts at a multiple of its size: at most a warp, or the block. Right
// in the team's first thread.
template <typename T>
NF_DEVICE T team_sum(T v, int log_team) {
  NF_SHARED(T, warps);
  for (int step = log_team > 5 ? 16 : 1 << log_team >> 1; step > 0; step >>= 1) v += shuffle_xor(v, step);
  if (log_team <= 5) return v;
  if (lane() == 0) warps[warp()] = v;
  sync_block();
  T sum = T(0);
  if (threadIdx.x == 0)
    for (int i = 0; i < kThreads / 32; ++i) sum += warps[i];
  return sum;
}

// --- second stages ---------------------------------------------------------------------------------------------------

// out[b] = running[b] + the sum of a sample's partials, a warp for each sample, in an order that the shape fixes.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_logdets(const T* partials, int pieces, const T* running, int64_t running_stride, int64_t batch, T* out) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp();
  T sum = T(0);
  if (b < batch)
    for (int i = lane(); i < pieces; i += 32) sum += partials[b * pieces + i];
  sum = team_sum(sum, 5);
  if (b < batch && lane() == 0) out[b] = running ? sum + running[b * running_stride] : sum;
}

// dgain[j] = the sum of a column of partials [rows, channels]; a block for each params channel. With a map, of every
// column that the map sends there.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_gains(const T* partials, int64_t rows, int64_t channels, const int64_t* channel_map, int64_t first, T* out) {
  const int64_t j = blockIdx.x;
  T sum = T(0);
  for (int64_t c = channel_map ? 0 : first + j; c < channels; ++c) {
    if (!channel_map || channel_map[c] == j)
      for (int64_t row = threadIdx.x; row < rows; row += kThreads) sum += partials[row * channels + c];
    if (!channel_map) break;
  }
  sum = team_sum(sum, 8);
  if (threadIdx.x == 0) out[j] = sum;
}

}  // namespace
}  // namespace cuda
}  // namespace nf
