// The Gaussian log-density's kernels. A unit of work is a sample, or one piece of a large sample; a team of threads (a
// power of two up to a warp, or the whole block) does it. Samples are walked in two ways: `run` kernels follow unit
// strides that all tensors share, a pack at a time; `tile` kernels serve every other layout, with neighbouring lanes
// along both axes where tensors disagree about the fast one, so that each of them is read in whole sectors.
#pragma once

#include <type_traits>

#include "../include/gaussian_log_density.h"
#include "../include/scalar_math.h"
#include "device.h"
#include "storage.h"

namespace nf {
namespace cuda {
namespace gaussian {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// --- what both walks share -------------------------------------------------------------------------------------------

struct Units {
  int64_t count;                  // batch * pieces
  int pieces;                     // of a sample; above 1 a unit takes a whole block
  int log_team;                   // 0 .. 5, or that of kThreads
  int64_t per_piece, per_sample;  // vectors or tiles
};

// Where the totals of samples go.
struct Total {
  void* out;            // [batch], or null: partials, for total_kernel
  void* partials;       // [batch, pieces]
  const void* running;  // added to the total, or null
  int64_t running_stride;
  double constant;  // of a sample
};

struct Unit {
  bool exists;
  int member;  // the thread's place in its team
  int64_t index, sample, begin, end;
};

NF_DEVICE Unit this_unit(const Units& u) {
  Unit out;
  out.member = static_cast<int>(threadIdx.x) & ((1 << u.log_team) - 1);
  out.index = static_cast<int64_t>(blockIdx.x) * (kThreads >> u.log_team) + (threadIdx.x >> u.log_team);
  out.exists = out.index < u.count;
  out.sample = out.index;
  out.begin = 0;
  if (u.pieces > 1) {
    out.sample = blockIdx.x / static_cast<unsigned>(u.pieces);
    out.begin = (out.index - out.sample * u.pieces) * u.per_piece;
  }
  const int64_t end = out.begin + u.per_piece;
  out.end = end < u.per_sample ? end : u.per_sample;
  return out;
}

// The sum over a team, to every member. All threads of the block call it.
template <typename T>
NF_DEVICE T team_sum(T v, int log_team) {
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const T other = shuffle_xor(v, 1 << i);
    v = i < log_team ? v + other : v;
  }
  if (log_team > 5) {
    NF_SHARED(T, parts);
    if (lane() == 0) parts[warp()] = v;
    sync_block();
    v = parts[lane() % kWarps];
#pragma unroll
    for (int mask = 1; mask < kWarps; mask *= 2) v += shuffle_xor(v, mask);
  }
  return v;
}

template <typename T>
NF_DEVICE T finished(T sum, const Total& to, int64_t sample) {
  const T total = T(-0.5) * sum - static_cast<T>(to.constant);
  return to.running ? total + static_cast<const T*>(to.running)[sample * to.running_stride] : total;
}

template <typename T>
NF_DEVICE void give_sum(T sum, const Total& to, const Units& units, const Unit& unit) {
  sum = team_sum(sum, units.log_team);
  if (!unit.exists || unit.member != 0) return;
  if (to.out)
    static_cast<T*>(to.out)[unit.sample] = finished(sum, to, unit.sample);
  else
    static_cast<T*>(to.partials)[unit.index] = sum;
}

// The second stage: a warp for each sample.
template <typename T>
__global__ __launch_bounds__(kThreads) void total_kernel(Total to, void* out, int64_t batch, int pieces) {
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  T sum = 0;
  if (sample < batch)
    for (int i = lane(); i < pieces; i += 32) sum += static_cast<const T*>(to.partials)[sample * pieces + i];
  sum = team_sum(sum, 5);
  if (sample < batch && lane() == 0) static_cast<T*>(out)[sample] = finished(sum, to, sample);
}

// Minus twice the log-density of one element, without its constant.
template <typename T, bool learned>
NF_DEVICE T term(T x, T mean, T log_scale) {
  if constexpr (!learned) return x * x;
  const T eps = (x - mean) * exp_(-log_scale);
  return eps * eps + T(2) * log_scale;
}

template <typename T>
struct Gradient {
  T x, mean, log_scale;
};

template <typename T, bool learned>
NF_DEVICE Gradient<T> gradient(T x, T mean, T log_scale, T d) {
  if constexpr (!learned) return {-d * x, T(0), T(0)};
  const T precision = exp_(-log_scale), eps = (x - mean) * precision;
  const T dmean = d * (eps * precision);
  return {-dmean, dmean, d * (eps * eps - T(1))};
}

// --- runs ------------------------------------------------------------------------------------------------------------

// Element i of row r of sample b is at b * batch + r * row + i.
struct Line {
  void* data = nullptr;
  int64_t batch = 0, row = 0;
};

struct Rows {
  bool apart;       // false: a sample is one row
  unsigned length;  // vectors in a row
};

// Where vector v of a sample is, less the sample's start, which is where `first` is where rows are not apart.
template <int N>
NF_DEVICE int64_t vector_offset(const Rows& rows, int64_t row_stride, int64_t v) {
  if (!rows.apart) return v * N;
  const unsigned row = static_cast<unsigned>(v) / rows.length;
  return row * row_stride + static_cast<int64_t>(static_cast<unsigned>(v) - row * rows.length) * N;
}

template <DType D, int N>
NF_DEVICE Pack<StorageType<D>, N> load_vector(const Line& line, const Rows& rows, int64_t sample, int64_t v) {
  const auto* p = static_cast<const StorageType<D>*>(line.data) + sample * line.batch;
  return load_pack<N>(p + vector_offset<N>(rows, line.row, v));
}

template <DType D, int N>
NF_DEVICE void store_vector(const Line& line, const Rows& rows, int64_t sample, int64_t v,
                            const Pack<StorageType<D>, N>& pack) {
  auto* p = static_cast<StorageType<D>*>(line.data) + sample * line.batch;
  store_pack(p + vector_offset<N>(rows, line.row, v), pack);
}

struct RunForward {
  Units units;
  Rows rows;
  Line x, mean, log_scale;
  Total total;
};

struct RunBackward {
  Units units;
  Rows rows;
  Line x, mean, log_scale, dx, dmean, dlog_scale;
  const void* dout;
  int64_t dout_stride;
};

template <DType X>
using Arithmetic = std::conditional_t<X == DType::f64, double, float>;

template <DType X, DType W, bool learned, int N>
__global__ __launch_bounds__(kThreads) void run_forward(RunForward k) {
  using T = Arithmetic<X>;
  constexpr int kAhead = learned ? 2 : 4;  // vectors in flight
  const Unit unit = this_unit(k.units);
  const int team = 1 << k.units.log_team;
  T sums[N] = {};
  if (unit.exists) {
    for (int64_t v = unit.begin + unit.member; v < unit.end; v += kAhead * team) {
      Pack<StorageType<X>, N> x[kAhead];
      Pack<StorageType<W>, N> mean[kAhead], log_scale[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t at = v + a * team;
        if (at >= unit.end) continue;
        x[a] = load_vector<X, N>(k.x, k.rows, unit.sample, at);
        if constexpr (learned) {
          mean[a] = load_vector<W, N>(k.mean, k.rows, unit.sample, at);
          log_scale[a] = load_vector<W, N>(k.log_scale, k.rows, unit.sample, at);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (v + a * team >= unit.end) continue;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const T m = learned ? T(Storage<W>::load(mean[a][i])) : T(0);
          const T s = learned ? T(Storage<W>::load(log_scale[a][i])) : T(0);
          sums[i] += term<T, learned>(Storage<X>::load(x[a][i]), m, s);
        }
      }
    }
  }
#pragma unroll
  for (int i = 1; i < N; ++i) sums[0] += sums[i];
  give_sum(sums[0], k.total, k.units, unit);
}

template <DType X, DType W, bool learned, int N>
__global__ __launch_bounds__(kThreads) void run_backward(RunBackward k) {
  using T = Arithmetic<X>;
  const Unit unit = this_unit(k.units);
  if (!unit.exists) return;
  const T d = static_cast<const T*>(k.dout)[unit.sample * k.dout_stride];
  for (int64_t v = unit.begin + unit.member; v < unit.end; v += 1 << k.units.log_team) {
    Pack<StorageType<W>, N> mean, log_scale;
    auto x = load_vector<X, N>(k.x, k.rows, unit.sample, v);
    if constexpr (learned) {
      mean = load_vector<W, N>(k.mean, k.rows, unit.sample, v);
      log_scale = load_vector<W, N>(k.log_scale, k.rows, unit.sample, v);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T m = learned ? T(Storage<W>::load(mean[i])) : T(0);
      const T s = learned ? T(Storage<W>::load(log_scale[i])) : T(0);
      const Gradient<T> g = gradient<T, learned>(Storage<X>::load(x[i]), m, s, d);
      x[i] = Storage<X>::store(g.x);
      if constexpr (learned) {
        mean[i] = Storage<W>::store(g.mean);
        log_scale[i] = Storage<W>::store(g.log_scale);
      }
    }
    if (k.dx.data) store_vector<X, N>(k.dx, k.rows, unit.sample, v, x);
    if constexpr (learned) {
      if (k.dmean.data) {
        store_vector<W, N>(k.dmean, k.rows, unit.sample, v, mean);
        store_vector<W, N>(k.dlog_scale, k.rows, unit.sample, v, log_scale);
      }
    }
  }
}

// --- tiles -----------------------------------------------------------------------------------------------------------

// A tile is 2^log_c groups of channels by team / 2^log_c positions. Of a team's number, the low log_p bits and those
// from log_p + log_c on are the position, those between them the group.
struct Tiles {
  int64_t channels, positions;
  unsigned across;  // tiles along positions; a sample of 2^31 tiles would fit no device
  int log_p, log_c;
};

struct TileForward {
  Units units;
  Tiles tiles;
  DType data, raw;
  View x, mean, log_scale;  // data of the latter two null: the standard normal
  Total total;
};

struct TileBackward {
  Units units;
  Tiles tiles;
  DType data, raw;
  View x, mean, log_scale, dx, dmean, dlog_scale;
  const void* dout;
  int64_t dout_stride;
};

// float data with params of a known type, in packs of four channels.
template <DType W>
struct Packed {
  using T = float;
  static constexpr int kGroup = 4;
  static NF_DEVICE float load(const void* p, int64_t at, DType) { return static_cast<const float*>(p)[at]; }
  static NF_DEVICE void store(void* p, int64_t at, DType, float v) { static_cast<float*>(p)[at] = v; }
  static NF_DEVICE void load_group(const void* p, int64_t at, DType, float (&to)[kGroup]) {
    const auto pack = load_pack<kGroup>(static_cast<const StorageType<W>*>(p) + at);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = Storage<W>::load(pack[i]);
  }
  static NF_DEVICE void store_group(void* p, int64_t at, DType, const float (&from)[kGroup]) {
    Pack<StorageType<W>, kGroup> pack;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) pack[i] = Storage<W>::store(from[i]);
    store_pack(static_cast<StorageType<W>*>(p) + at, pack);
  }
};

// Any types and strides, one element at a time.
template <typename Number>
struct Single {
  using T = Number;
  static constexpr int kGroup = 1;
  template <DType D>
  static NF_DEVICE const StorageType<D>& element(const void* p, int64_t at) {
    return static_cast<const StorageType<D>*>(p)[at];
  }
  static NF_DEVICE T load(const void* p, int64_t at, DType type) {
    if (type == DType::bf16) return Storage<DType::bf16>::load(element<DType::bf16>(p, at));
    if (type == DType::f16) return Storage<DType::f16>::load(element<DType::f16>(p, at));
    if constexpr (sizeof(T) == 8)
      if (type == DType::f64) return element<DType::f64>(p, at);
    return element<DType::f32>(p, at);
  }
  static NF_DEVICE void store(void* p, int64_t at, DType type, T v) {
    if (type == DType::bf16)
      static_cast<__nv_bfloat16*>(p)[at] = Storage<DType::bf16>::store(static_cast<float>(v));
    else if (type == DType::f16)
      static_cast<__half*>(p)[at] = Storage<DType::f16>::store(static_cast<float>(v));
    else if (sizeof(T) == 8 && type == DType::f64)
      static_cast<double*>(p)[at] = v;
    else
      static_cast<float*>(p)[at] = static_cast<float>(v);
  }
  static NF_DEVICE void load_group(const void* p, int64_t at, DType type, T (&to)[1]) { to[0] = load(p, at, type); }
  static NF_DEVICE void store_group(void* p, int64_t at, DType type, const T (&v)[1]) { store(p, at, type, v[0]); }
};

// Calls visit(channel, position) for each group of channels that the thread has in its unit.
template <int kGroup, typename Visit>
NF_DEVICE void for_groups(const Tiles& t, const Units& units, const Unit& unit, Visit&& visit) {
  const int log_team = units.log_team, member = unit.member;
  const int low = member & ((1 << t.log_p) - 1), high = member >> (t.log_p + t.log_c) << t.log_p;
  const int64_t my_position = low | high;
  const int64_t my_channel = (member >> t.log_p & ((1 << t.log_c) - 1)) * kGroup;
  const int64_t tile_channels = static_cast<int64_t>(kGroup) << t.log_c;
  const int64_t tile_positions = int64_t{1} << (log_team - t.log_c);
  unsigned down = static_cast<unsigned>(unit.begin) / t.across, across = static_cast<unsigned>(unit.begin) % t.across;
  for (int64_t i = unit.begin; i < unit.end; ++i) {
    const int64_t c = down * tile_channels + my_channel, p = across * tile_positions + my_position;
    if (c < t.channels && p < t.positions) visit(c, p);
    if (++across == t.across) across = 0, ++down;
  }
}

NF_DEVICE int64_t offset(const View& v, int64_t b, int64_t c, int64_t p) { return b * v.b + c * v.c + p * v.p; }

template <class Access>
__global__ __launch_bounds__(kThreads) void tile_forward(TileForward k) {
  using T = typename Access::T;
  constexpr int kGroup = Access::kGroup;
  const Unit unit = this_unit(k.units);
  T sum = 0;
  if (unit.exists)
    for_groups<kGroup>(k.tiles, k.units, unit, [&](int64_t c, int64_t p) {
      T mean[kGroup] = {}, log_scale[kGroup] = {}, x[kGroup];
      if (k.mean.data) {
        Access::load_group(k.mean.data, offset(k.mean, unit.sample, c, p), k.raw, mean);
        Access::load_group(k.log_scale.data, offset(k.log_scale, unit.sample, c, p), k.raw, log_scale);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = Access::load(k.x.data, offset(k.x, unit.sample, c + i, p), k.data);
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        sum += k.mean.data ? term<T, true>(x[i], mean[i], log_scale[i]) : term<T, false>(x[i], T(0), T(0));
    });
  give_sum(sum, k.total, k.units, unit);
}

template <class Access>
__global__ __launch_bounds__(kThreads) void tile_backward(TileBackward k) {
  using T = typename Access::T;
  constexpr int kGroup = Access::kGroup;
  const Unit unit = this_unit(k.units);
  if (!unit.exists) return;
  const T d = static_cast<const T*>(k.dout)[unit.sample * k.dout_stride];
  for_groups<kGroup>(k.tiles, k.units, unit, [&](int64_t c, int64_t p) {
    T mean[kGroup] = {}, log_scale[kGroup] = {}, x[kGroup];
    if (k.mean.data) {
      Access::load_group(k.mean.data, offset(k.mean, unit.sample, c, p), k.raw, mean);
      Access::load_group(k.log_scale.data, offset(k.log_scale, unit.sample, c, p), k.raw, log_scale);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = Access::load(k.x.data, offset(k.x, unit.sample, c + i, p), k.data);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const Gradient<T> g =
          k.mean.data ? gradient<T, true>(x[i], mean[i], log_scale[i], d) : gradient<T, false>(x[i], T(0), T(0), d);
      if (k.dx.data) Access::store(k.dx.data, offset(k.dx, unit.sample, c + i, p), k.data, g.x);
      mean[i] = g.mean;
      log_scale[i] = g.log_scale;
    }
    if (k.dmean.data) {
      Access::store_group(k.dmean.data, offset(k.dmean, unit.sample, c, p), k.raw, mean);
      Access::store_group(k.dlog_scale.data, offset(k.dlog_scale, unit.sample, c, p), k.raw, log_scale);
    }
  });
}

}  // namespace gaussian
}  // namespace cuda
}  // namespace nf
