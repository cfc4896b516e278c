// The forward (and the inverse) where every tensor's lines lie alike, and where they lie anyhow.
//
// A team of threads (part of a warp, a warp or the block) does a sample or a piece of a large one and sums its log s.
#pragma once

#include "affine_coupling_layout.h"

namespace nf {
namespace cuda {
namespace {

// Full vectors are read once: first to leave the cache. Smaller accesses share sectors with their neighbours.
template <int N, typename T>
NF_DEVICE Pack<T, N> fetch(const T* from) {
  if constexpr (N * sizeof(T) >= 16)
    return load_pack_stream<N>(from);
  else
    return load_pack<N>(from);
}

// Vectors [begin, end) of lines, copied by a team.
template <int V, int kAhead = 4, typename S>
NF_DEVICE void copy_lines(const S* from, uint32_t from_row, S* to, uint32_t to_row, const Divider& line, uint32_t begin,
                          uint32_t end, uint32_t step) {
  for (uint32_t v = begin; v < end; v += kAhead * step) {
    Pack<S, V> held[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t at = v + i * step, o = line(at);
      if (at < end) held[i] = fetch<V>(from + (o * from_row + (at - o * line.divisor) * V));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t at = v + i * step, o = line(at);
      if (at < end) store_pack(to + (o * to_row + (at - o * line.divisor) * V), held[i]);
    }
  }
}

// How many elements of a vector are computed at a time: the others wait as they were read, in fewer registers.
template <typename T, int V>
constexpr int kAtOnce = sizeof(T) == 8 ? 1
                        : V < 4        ? V
                                       : 4;

// Element i of two packs that follow each other.
template <typename P, int V>
NF_DEVICE P& element(Pack<P, V>& a, Pack<P, V>& b, int i) {
  return i < V ? a[i < V ? i : 0] : b[i < V ? 0 : i - V];
}

// Shifts and raw scales of elements [at, at + N), from a pack of each, or from pairs that alternate.
template <DType R, int V, int N, typename T>
NF_DEVICE void split_params(Pack<StorageType<R>, V>& a, Pack<StorageType<R>, V>& b, int at, bool paired,
                            bool scale_leads, T (&t)[N], T (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const auto first = paired ? element(a, b, 2 * (at + i)) : scale_leads ? b[at + i] : a[at + i];
    const auto second = paired ? element(a, b, 2 * (at + i) + 1) : scale_leads ? a[at + i] : b[at + i];
    t[i] = Storage<R>::load(scale_leads ? second : first);
    r[i] = Storage<R>::load(scale_leads ? first : second);
  }
}

template <typename T>
struct ForwardArgs {
  Formula<T> f;
  int64_t units;  // samples times pieces
  int pieces, log_team;
  uint32_t vectors, per_piece, passing, passing_per_piece;  // of a sample
  Divider line, passing_line;
  Port x, y, first, second, from, to;  // first, second: of params; from, to: of the half that passes through
  uint32_t step;                       // params elements per data element of a line
  bool paired, scale_leads;
  const T* gain;
  uint32_t gain_row, gain_column;
  T* out;  // of each unit
  const T* running;
  int64_t running_stride;
};

template <DType D, DType R, int V>
struct ForwardItem {
  Pack<StorageType<D>, V> x;
  Pack<StorageType<R>, V> a, b;
};

// Registers for half of a multiprocessor's threads, less where a vector's arithmetic takes more of them.
template <DType D, int V>
constexpr int kForwardBlocks = V == 8 || (D == DType::f64 && V == 2) ? 3 : 4;

template <DType D, DType R, int V>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<D, V>) forward_lines(const ForwardArgs<ArithmeticOf<D>> k) {
  using T = ArithmeticOf<D>;
  using S = StorageType<D>;
  using P = StorageType<R>;
  const uint32_t team = 1u << k.log_team, member = threadIdx.x & (team - 1);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads >> k.log_team) + (threadIdx.x >> k.log_team);
  T sum = T(0);
  if (unit < k.units) {
    const int64_t b = k.pieces == 1 ? unit : unit / k.pieces;
    const uint32_t piece = static_cast<uint32_t>(unit - b * k.pieces);
    const S* x = static_cast<const S*>(k.x.data) + b * k.x.batch;
    S* y = static_cast<S*>(k.y.data) + b * k.y.batch;
    const P *first = static_cast<const P*>(k.first.data) + b * k.first.batch,
            *second = static_cast<const P*>(k.second.data) + b * k.second.batch;
    const auto load = [&](uint32_t v) {
      const uint32_t o = k.line(v), i = (v - o * k.line.divisor) * V;
      ForwardItem<D, R, V> item;
      item.x = fetch<V>(x + (o * k.x.row + i));
      item.a = fetch<V>(first + (o * k.first.row + i * k.step));
      item.b = k.f.has_scale ? fetch<V>(second + (o * k.second.row + i * k.step)) : item.a;
      return item;
    };
    uint32_t v = piece * k.per_piece + member;
    const uint32_t end = min_((piece + 1) * k.per_piece, k.vectors);
    ForwardItem<D, R, V> item;
    if (v < end) item = load(v);
    if (k.passing) {
      const uint32_t q = piece * k.passing_per_piece;
      copy_lines<V>(static_cast<const S*>(k.from.data) + b * k.from.batch, k.from.row,
                    static_cast<S*>(k.to.data) + b * k.to.batch, k.to.row, k.passing_line, q + member,
                    min_(q + k.passing_per_piece, k.passing), team);
    }
    while (v < end) {
      const uint32_t next = v + team, o = k.line(v), i = v - o * k.line.divisor;
      ForwardItem<D, R, V> now = item;
      if (next < end) item = load(next);  // under way while this one is computed
      Gains<T, 1> gains;
      gains.clear();
      if (k.f.has_gain) gains.set(0, k.gain[o * k.gain_row + i * k.gain_column]);
      Pack<S, V> out;
      constexpr int N = kAtOnce<T, V>;
#pragma unroll
      for (int h = 0; h < V; h += N) {
        T xs[N], t[N], r[N], log_s[N];
#pragma unroll
        for (int e = 0; e < N; ++e) xs[e] = Storage<D>::load(now.x[h + e]);
        split_params<R, V>(now.a, now.b, h, k.paired, k.scale_leads, t, r);
        transform(k.f, xs, t, r, gains, log_s);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          out[h + e] = Storage<D>::store(xs[e]);
          sum += log_s[e];
        }
      }
      store_pack(y + (o * k.y.row + i * V), out);
      v = next;
    }
  }
  sum = team_sum(sum, k.log_team);
  if (member == 0 && unit < k.units) k.out[unit] = k.running ? sum + k.running[unit * k.running_stride] : sum;
}

// --- anything: strides, masks, maps, dtypes at run time
// ---------------------------------------------------------------

template <typename T>
NF_DEVICE T load_any(const void* from, DType d, int64_t i) {
  switch (d) {
    case DType::f32:
      return static_cast<const float*>(from)[i];
    case DType::bf16:
      return Storage<DType::bf16>::load(static_cast<const StorageType<DType::bf16>*>(from)[i]);
    case DType::f16:
      return Storage<DType::f16>::load(static_cast<const StorageType<DType::f16>*>(from)[i]);
    default:
      return static_cast<T>(static_cast<const double*>(from)[i]);
  }
}

template <typename T>
NF_DEVICE void store_any(void* to, DType d, int64_t i, T v) {
  switch (d) {
    case DType::f32:
      static_cast<float*>(to)[i] = static_cast<float>(v);
      break;
    case DType::bf16:
      static_cast<StorageType<DType::bf16>*>(to)[i] = Storage<DType::bf16>::store(static_cast<float>(v));
      break;
    case DType::f16:
      static_cast<StorageType<DType::f16>*>(to)[i] = Storage<DType::f16>::store(static_cast<float>(v));
      break;
    default:
      static_cast<double*>(to)[i] = v;
  }
}

// Where a data channel finds its params.
NF_DEVICE int64_t source_of(const int64_t* channel_map, int64_t first, int64_t transformed, int64_t c) {
  const int64_t j = channel_map ? channel_map[c] : c - first;
  return j >= 0 && j < transformed ? j : -1;
}

template <typename T>
struct AnyForwardArgs {
  Formula<T> f;
  DType data, raw;
  View x, y, mask, shift, scale;  // shift, scale: by transformed channel
  const int64_t* channel_map;
  int64_t first, transformed;
  int64_t units, elements, per_piece;  // elements of a sample
  int pieces, log_team;
  bool along_positions;
  Divider line;
  const T* gain;
  T* out;
  const T* running;
  int64_t running_stride;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3) forward_any(const AnyForwardArgs<T> k) {
  constexpr int N = sizeof(T) == 8 ? 2 : 4;
  const uint32_t team = 1u << k.log_team, member = threadIdx.x & (team - 1);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads >> k.log_team) + (threadIdx.x >> k.log_team);
  T sum = T(0);
  if (unit < k.units) {
    const int64_t b = k.pieces == 1 ? unit : unit / k.pieces;
    const int64_t begin = (unit - b * k.pieces) * k.per_piece;
    const int64_t o0 = begin == 0 ? 0 : begin / k.line.divisor;
    const uint32_t i0 = static_cast<uint32_t>(begin - o0 * k.line.divisor);
    const uint32_t count = static_cast<uint32_t>(min_(k.per_piece, k.elements - begin));
    for (uint32_t n = member; n < count; n += N * team) {
      T x[N], t[N], r[N], log_s[N];
      int64_t to[N];
      uint32_t live = 0;
      Gains<T, N> gains;
      gains.clear();
#pragma unroll
      for (int e = 0; e < N; ++e) {
        x[e] = t[e] = r[e] = T(0);
        to[e] = -1;
        if (n + e * team < count) {
          const uint32_t at = i0 + n + e * team, rows = k.line(at), i = at - rows * k.line.divisor;
          const int64_t o = o0 + rows, c = k.along_positions ? o : i, p = k.along_positions ? i : o;
          const int64_t j = source_of(k.channel_map, k.first, k.transformed, c);
          x[e] = load_any<T>(k.x.data, k.data, b * k.x.b + c * k.x.c + p * k.x.p);
          to[e] = b * k.y.b + c * k.y.c + p * k.y.p;
          const bool on = j >= 0 && (!k.mask.data ||
                                     static_cast<const bool*>(k.mask.data)[b * k.mask.b + c * k.mask.c + p * k.mask.p]);
          if (on) {  // a raw value that is not used must not reach exp
            live |= 1u << e;
            t[e] = load_any<T>(k.shift.data, k.raw, b * k.shift.b + j * k.shift.c + p * k.shift.p);
            if (k.f.has_scale) r[e] = load_any<T>(k.scale.data, k.raw, b * k.scale.b + j * k.scale.c + p * k.scale.p);
            if (k.f.has_gain) gains.set(e, k.gain[j]);
          }
        }
      }
      T kept[N];
#pragma unroll
      for (int e = 0; e < N; ++e) kept[e] = x[e];
      transform(k.f, x, t, r, gains, log_s);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const bool on = live >> e & 1;
        if (to[e] >= 0) store_any(k.y.data, k.data, to[e], on ? x[e] : kept[e]);
        sum += on ? log_s[e] : T(0);
      }
    }
  }
  sum = team_sum(sum, k.log_team);
  if (member == 0 && unit < k.units) k.out[unit] = k.running ? sum + k.running[unit * k.running_stride] : sum;
}

}  // namespace
}  // namespace cuda
}  // namespace nf
