// Forward and backward where params lie across the data: contiguous data with channels-last params, or the reverse.
//
// A block takes a stretch of positions of one sample at a time. All its params are read in their own order with full
// vectors and turned in shared memory; the data is walked in its own order; gradients of params go back the same way.
// A row of shared memory is what a line of the data needs: a params channel's stretch, or a position's channels, with
// shifts and scales kept apart.
#pragma once

#include "affine_coupling_backward.h"

namespace nf {
namespace cuda {
namespace {

struct Stage {
  bool along_positions;  // the data's lines; params are channels-last then, else contiguous
  bool interleaved;
  uint32_t transformed, width;  // channels that carry a shift; params channels
  uint32_t stretch, log_stretch, tiles,
      positions;                 // positions of a tile, a power of 2; tiles and positions of a sample
  uint32_t pitch, shift, scale;  // of shared memory: elements of a row, where shifts and scales start
  Divider by_width;
  uint32_t rows, passing_rows;       // lines of a tile where they run along positions
  Divider line[2], passing_line[2];  // a tile's lines in vectors; the second: of the last tile

  NF_DEVICE uint32_t slot(uint32_t w) const { return interleaved ? (w & 1) * transformed + (w >> 1) : w; }
};

// One tile of a sample, and how many vectors of data there are in it.
struct StageTile {
  uint32_t p0, here;
  bool last;
  uint32_t vectors, passing;

  NF_DEVICE StageTile(const Stage& k, uint32_t tile)
      : p0(tile * k.stretch), here(min_(k.stretch, k.positions - p0)), last(tile + 1 == k.tiles) {
    vectors = (k.along_positions ? k.rows : here) * k.line[last].divisor;
    passing = (k.along_positions ? k.passing_rows : here) * k.passing_line[last].divisor;
  }
};

// Visits a tile's params, a vector at a time: f(offset from the sample's first element, how many of the vector's
// elements there are, the place of each in shared memory).
template <int VR, typename F>
NF_DEVICE void visit_params(const Stage& k, uint32_t p0, uint32_t here, uint32_t channel_stride, F&& f) {
  if (k.along_positions) {
    const uint32_t elements = here * k.width;
    for (uint32_t at = threadIdx.x * VR; at < elements; at += kThreads * VR) {
      uint32_t p = k.by_width(at), w = at - p * k.width, places[VR];
#pragma unroll
      for (int i = 0; i < VR; ++i) {
        places[i] = k.slot(w) * k.pitch + p;
        if (++w == k.width) w = 0, ++p;
      }
      f(p0 * k.width + at, min_(elements - at, static_cast<uint32_t>(VR)), places);
    }
  } else {
    // A warp takes 16 channels by two vectors: whole sectors of memory, and banks of shared memory that differ.
    constexpr uint32_t kLogPair = VR == 8 ? 4 : 3;
    static_assert(VR == 8 || VR == 4);
    const uint32_t log_pairs = k.log_stretch > kLogPair ? k.log_stretch - kLogPair : 0;
    const uint32_t tasks = ((k.width + 15) / 16) << log_pairs;
    for (uint32_t task = warp(); task < tasks; task += kThreads / 32) {
      const uint32_t w = (task >> log_pairs) * 16 + (lane() >> 1);
      const uint32_t p = ((task & ((1u << log_pairs) - 1)) * 2 + (lane() & 1)) * VR;
      if (w >= k.width || p >= here) continue;
      const uint32_t slot = k.slot(w);
      uint32_t places[VR];
#pragma unroll
      for (int i = 0; i < VR; ++i) places[i] = (p + i) * k.pitch + slot;
      f(w * channel_stride + p0 + p, static_cast<uint32_t>(VR), places);
    }
  }
}

template <int VR, typename P>
NF_DEVICE void bring_params(const Stage& k, const StageTile& tile, const P* from, uint32_t channel_stride, P* shared) {
  visit_params<VR>(k, tile.p0, tile.here, channel_stride, [&](uint32_t at, uint32_t n, const uint32_t (&places)[VR]) {
    if (n == VR) {
      const Pack<P, VR> pack = load_pack_stream<VR>(from + at);
#pragma unroll
      for (int i = 0; i < VR; ++i) shared[places[i]] = pack[i];
    } else {
#pragma unroll
      for (int i = 0; i < VR; ++i)
        if (i < static_cast<int>(n)) shared[places[i]] = from[at + i];
    }
  });
}

template <int VR, typename P>
NF_DEVICE void send_params(const Stage& k, const StageTile& tile, P* to, uint32_t channel_stride, const P* shared) {
  visit_params<VR>(k, tile.p0, tile.here, channel_stride, [&](uint32_t at, uint32_t n, const uint32_t (&places)[VR]) {
    if (n == VR) {
      Pack<P, VR> pack;
#pragma unroll
      for (int i = 0; i < VR; ++i) pack[i] = shared[places[i]];
      store_pack(to + at, pack);
    } else {
#pragma unroll
      for (int i = 0; i < VR; ++i)
        if (i < static_cast<int>(n)) to[at + i] = shared[places[i]];
    }
  });
}

// The data of a tile: strides of samples, lines and positions.
struct StagePort {
  void* data = nullptr;
  int64_t batch = 0;
  uint32_t row = 0, position = 0;
};

template <typename S>
NF_DEVICE S* tile_start(const StagePort& port, int64_t b, const StageTile& tile) {
  return static_cast<S*>(port.data) + (b * port.batch + static_cast<int64_t>(tile.p0) * port.position);
}

template <typename T>
struct StagedForwardArgs {
  Formula<T> f;
  Stage stage;
  uint32_t tiles_per_unit;
  int pieces;
  StagePort x, y, from, to;
  Port params;  // row: between channels
  const T* gain;
  T* out;
  const T* running;
  int64_t running_stride;
};

template <DType D, DType R, int V>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<D, V>)
    forward_staged(const StagedForwardArgs<ArithmeticOf<D>> k) {
  using T = ArithmeticOf<D>;
  using S = StorageType<D>;
  using P = StorageType<R>;
  constexpr int VR = 16 / sizeof(P);
  NF_SHARED(P, shared);
  const uint32_t unit = blockIdx.x, b = unit / static_cast<uint32_t>(k.pieces);
  const uint32_t tile0 = (unit - b * k.pieces) * k.tiles_per_unit;
  const uint32_t tile1 = min_(tile0 + k.tiles_per_unit, k.stage.tiles);
  T sum = T(0);
  for (uint32_t i_tile = tile0; i_tile < tile1; ++i_tile) {
    const StageTile tile(k.stage, i_tile);
    const Divider line = k.stage.line[tile.last];
    const S* x = tile_start<const S>(k.x, b, tile);
    S* y = tile_start<S>(k.y, b, tile);
    const auto load = [&](uint32_t n) {
      const uint32_t o = line(n);
      return fetch<V>(x + (o * k.x.row + (n - o * line.divisor) * V));
    };
    uint32_t n = threadIdx.x;
    Pack<S, V> ahead;
    if (n < tile.vectors) ahead = load(n);  // under way while params arrive
    bring_params<VR>(k.stage, tile, static_cast<const P*>(k.params.data) + b * k.params.batch, k.params.row, shared);
    if (tile.passing)
      copy_lines<V, 2>(tile_start<const S>(k.from, b, tile), k.from.row, tile_start<S>(k.to, b, tile), k.to.row,
                       k.stage.passing_line[tile.last], threadIdx.x, tile.passing, kThreads);
    sync_block();
    while (n < tile.vectors) {
      const uint32_t next = n + kThreads, o = line(n), i = (n - o * line.divisor) * V;
      const Pack<S, V> now = ahead;
      const P* at = shared + (o * k.stage.pitch + i);
      Pack<P, V> a = load_pack<V>(at + k.stage.shift), r_pack = a;
      if (k.f.has_scale) r_pack = load_pack<V>(at + k.stage.scale);
      Gains<T, 1> gains;
      gains.clear();
      if (k.f.has_gain) gains.set(0, k.gain[k.stage.along_positions ? o : i]);
      Pack<S, V> out;
      constexpr int N = kAtOnce<T, V>;
#pragma unroll
      for (int h = 0; h < V; h += N) {
        T xs[N], t[N], r[N], log_s[N];
#pragma unroll
        for (int e = 0; e < N; ++e) xs[e] = Storage<D>::load(now[h + e]);
        split_params<R, V>(a, r_pack, h, false, false, t, r);
        transform(k.f, xs, t, r, gains, log_s);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          out[h + e] = Storage<D>::store(xs[e]);
          sum += log_s[e];
        }
      }
      store_pack(y + (o * k.y.row + i), out);
      if (next < tile.vectors) ahead = load(next);
      n = next;
    }
    sync_block();
  }
  sum = team_sum(sum, 8);
  if (threadIdx.x == 0) k.out[unit] = k.running ? sum + k.running[unit * k.running_stride] : sum;
}

template <typename T>
struct StagedBackwardArgs {
  Formula<T> f;
  Stage stage;
  bool rebuild, has_dy, read_y, read_shift;
  uint32_t tiles_per_unit;
  int pieces;
  StagePort y, dy, dx, x, y_from, dy_from, dx_to, x_to;
  Port params, dparams;
  const T* dlogdet;
  int64_t dlogdet_stride;
};

// The half that passes through: dy, or zeros where there is none.
template <int V, typename S>
NF_DEVICE void copy_tile(const StagePort& from, const StagePort& to, int64_t b, const StageTile& tile,
                         const Divider& line) {
  if (from.data) {
    copy_lines<V, 2>(tile_start<const S>(from, b, tile), from.row, tile_start<S>(to, b, tile), to.row, line,
                     threadIdx.x, tile.passing, kThreads);
  } else {
    for (uint32_t n = threadIdx.x; n < tile.passing; n += kThreads) {
      const uint32_t o = line(n);
      store_pack(tile_start<S>(to, b, tile) + (o * to.row + (n - o * line.divisor) * V), Pack<S, V>{});
    }
  }
}

template <DType D, DType R, int V>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<D, V, false>)
    backward_staged(const StagedBackwardArgs<ArithmeticOf<D>> k) {
  using T = ArithmeticOf<D>;
  using S = StorageType<D>;
  using P = StorageType<R>;
  constexpr int VR = 16 / sizeof(P);
  NF_SHARED(P, shared);
  const uint32_t unit = blockIdx.x, b = unit / static_cast<uint32_t>(k.pieces);
  const uint32_t tile0 = (unit - b * k.pieces) * k.tiles_per_unit;
  const uint32_t tile1 = min_(tile0 + k.tiles_per_unit, k.stage.tiles);
  const T dlogdet[1] = {k.dlogdet ? k.dlogdet[b * k.dlogdet_stride] : T(0)};
  Gains<T, 1> gains;
  gains.clear();
  for (uint32_t i_tile = tile0; i_tile < tile1; ++i_tile) {
    const StageTile tile(k.stage, i_tile);
    const Divider line = k.stage.line[tile.last];
    bring_params<VR>(k.stage, tile, static_cast<const P*>(k.params.data) + b * k.params.batch, k.params.row, shared);
    if (tile.passing) {
      copy_tile<V, S>(k.dy_from, k.dx_to, b, tile, k.stage.passing_line[tile.last]);
      if (k.rebuild) copy_tile<V, S>(k.y_from, k.x_to, b, tile, k.stage.passing_line[tile.last]);
    }
    sync_block();
    for (uint32_t n = threadIdx.x; n < tile.vectors; n += kThreads) {
      const uint32_t o = line(n), i = (n - o * line.divisor) * V;
      Pack<S, V> y{}, dy{};
      Pack<P, V> a{}, r_pack{};
      if (k.read_y) y = fetch<V>(tile_start<const S>(k.y, b, tile) + (o * k.y.row + i));
      if (k.has_dy) dy = fetch<V>(tile_start<const S>(k.dy, b, tile) + (o * k.dy.row + i));
      P* at = shared + (o * k.stage.pitch + i);
      if (k.read_shift) a = load_pack<V>(at + k.stage.shift);
      if (k.f.has_scale) r_pack = load_pack<V>(at + k.stage.scale);
      constexpr int N = kAtOnce<T, V>;
#pragma unroll
      for (int h = 0; h < V; h += N) {
        T ys[N], dys[N], t[N], r[N];
#pragma unroll
        for (int e = 0; e < N; ++e) {
          ys[e] = Storage<D>::load(y[h + e]);
          dys[e] = Storage<D>::load(dy[h + e]);
        }
        split_params<R, V>(a, r_pack, h, false, false, t, r);
        gradients<false>(k.f, k.rebuild, ys, dys, t, r, dlogdet, gains, 0);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          y[h + e] = Storage<D>::store(ys[e]);
          dy[h + e] = Storage<D>::store(dys[e]);
        }
        join_params<R, V>(t, r, h, false, false, a, r_pack);
      }
      store_pack(at + k.stage.shift, a);
      if (k.f.has_scale) store_pack(at + k.stage.scale, r_pack);
      store_pack(tile_start<S>(k.dx, b, tile) + (o * k.dx.row + i), dy);
      if (k.rebuild) store_pack(tile_start<S>(k.x, b, tile) + (o * k.x.row + i), y);
    }
    sync_block();
    send_params<VR>(k.stage, tile, static_cast<P*>(k.dparams.data) + b * k.dparams.batch, k.dparams.row, shared);
    sync_block();
  }
}

}  // namespace
}  // namespace cuda
}  // namespace nf
