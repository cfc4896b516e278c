// The backward, from the output: where every tensor's lines lie alike, and where they lie anyhow.
//
// Every thread keeps to one channel (or to one vector of channels, along channels) and walks over samples and
// positions, so that a channel's gain, and the sum of its gradient, stay with the thread.
#pragma once

#include "affine_coupling_forward.h"

namespace nf {
namespace cuda {
namespace {

// How a block's threads are dealt to channels and to places (sample and position). The last threads may have none.
struct Deal {
  int channels, places;  // threads along each
  bool channels_inner;   // neighbouring threads have neighbouring channels
  Divider inner;
  int64_t channel_blocks, all_channels, all_places;
  uint32_t per_block;  // places
  Divider positions;   // a place is sample * positions + position

  NF_DEVICE void seat(int* channel, int* place) const {
    const uint32_t outer = inner(threadIdx.x);
    const int within = static_cast<int>(threadIdx.x - outer * inner.divisor);
    *channel = channels_inner ? within : static_cast<int>(outer);
    *place = channels_inner ? static_cast<int>(outer) : within;
  }
  NF_DEVICE int thread_of(int channel, int place) const {
    return channels_inner ? place * channels + channel : channel * places + place;
  }
};

// Strides in elements of a tensor as a Deal counts: of a sample, of a channel (vector), of a position (vector).
struct Track {
  void* data = nullptr;
  int64_t batch = 0;
  uint32_t channel = 0, position = 0;
};

// Writes the block's sum of each channel to a row of partials: [blocks of places, all channels].
template <typename T>
NF_DEVICE void write_gains(const Deal& deal, int channel, int place, bool seated, T sum, int64_t c, int64_t row,
                           T* partials) {
  NF_SHARED(T, shared);
  sync_block();
  shared[threadIdx.x] = seated ? sum : T(0);
  int half = 1;
  while (half < deal.places) half *= 2;
  while (half >>= 1) {
    sync_block();
    if (channel < deal.channels && place < half && place + half < deal.places)
      shared[threadIdx.x] += shared[deal.thread_of(channel, place + half)];
  }
  if (seated && place == 0) partials[row * deal.all_channels + c] = shared[threadIdx.x];
}

template <typename T>
struct BackwardArgs {
  Formula<T> f;
  Deal deal;
  bool rebuild, read_y, read_shift, read_scale, has_dy, paired, scale_leads;
  Track y, dy, dx, x, first, second, dfirst, dsecond;
  const T* dlogdet;
  int64_t dlogdet_stride;
  const T* gain;
  T* partials;
  // The half that passes through: of dy to dx, of y to x.
  int64_t passing, passing_per_block;  // vectors, in all and for each block
  Divider passing_line, passing_vectors;
  Port y_from, dy_from, dx_to, x_to;
};

// The reverse of split_params.
template <DType R, int V, int N, typename T>
NF_DEVICE void join_params(const T (&t)[N], const T (&r)[N], int at, bool paired, bool scale_leads,
                           Pack<StorageType<R>, V>& a, Pack<StorageType<R>, V>& b) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const auto shift = Storage<R>::store(t[i]), scale = Storage<R>::store(r[i]);
    if (paired) {
      element(a, b, 2 * (at + i)) = scale_leads ? scale : shift;
      element(a, b, 2 * (at + i) + 1) = scale_leads ? shift : scale;
    } else {
      a[at + i] = shift;
      b[at + i] = scale;
    }
  }
}

template <DType D, DType R, int V>
struct BackwardItem {
  Pack<StorageType<D>, V> y, dy;
  Pack<StorageType<R>, V> a, b;
};

template <int V, typename S, typename T>
NF_DEVICE void copy_passing(const BackwardArgs<T>& k, const Port& from, const Port& to) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * k.passing_per_block;
  if (begin >= k.passing) return;
  const int64_t b0 = begin / k.passing_vectors.divisor;
  const uint32_t v0 = static_cast<uint32_t>(begin - b0 * k.passing_vectors.divisor);
  const uint32_t count = static_cast<uint32_t>(min_(k.passing_per_block, k.passing - begin));
  const S* source = static_cast<const S*>(from.data);
  S* target = static_cast<S*>(to.data);
  constexpr int kAhead = 2;
  for (uint32_t n = threadIdx.x; n < count; n += kAhead * kThreads) {
    Pack<S, V> held[kAhead];
    int64_t at[kAhead];
#pragma unroll
    for (int e = 0; e < kAhead; ++e) {
      const uint32_t v = v0 + n + e * kThreads, samples = k.passing_vectors(v);
      const uint32_t within = v - samples * k.passing_vectors.divisor, o = k.passing_line(within);
      const uint32_t i = (within - o * k.passing_line.divisor) * V;
      at[e] = (b0 + samples) * to.batch + (o * to.row + i);
      if (n + e * kThreads < count) {
        if (source) {
          held[e] = fetch<V>(source + ((b0 + samples) * from.batch + (o * from.row + i)));
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j) held[e][j] = S{};
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kAhead; ++e)
      if (n + e * kThreads < count) store_pack(target + at[e], held[e]);
  }
}

// Registers for half of a multiprocessor's threads, less where a vector's arithmetic takes more of them.
template <DType D, int V, bool with_gain>
constexpr int kBackwardBlocks = with_gain || V == 8 || (D == DType::f64 && V == 2) ? 3 : 4;

template <DType D, DType R, int V, bool with_gain>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<D, V, with_gain>)
    backward_lines(const BackwardArgs<ArithmeticOf<D>> k) {
  using T = ArithmeticOf<D>;
  using S = StorageType<D>;
  using P = StorageType<R>;
  int channel, place;
  k.deal.seat(&channel, &place);
  const int64_t row = blockIdx.x / k.deal.channel_blocks;
  const int64_t c = (blockIdx.x - row * k.deal.channel_blocks) * k.deal.channels + channel;
  const bool seated = channel < k.deal.channels && place < k.deal.places && c < k.deal.all_channels;
  const int64_t begin = row * k.deal.per_block, b0 = begin / k.deal.positions.divisor;
  const uint32_t p0 = static_cast<uint32_t>(begin - b0 * k.deal.positions.divisor);
  const uint32_t count =
      seated ? static_cast<uint32_t>(min_(static_cast<int64_t>(k.deal.per_block), k.deal.all_places - begin)) : 0;
  const uint32_t own = static_cast<uint32_t>(c);
  const auto offset = [&](const Track& t, uint32_t sample, uint32_t p) {
    return (b0 + sample) * t.batch + (own * t.channel + p * t.position);
  };
  const auto load = [&](uint32_t sample, uint32_t p) {
    BackwardItem<D, R, V> item{};
    if (k.read_y) item.y = fetch<V>(static_cast<const S*>(k.y.data) + offset(k.y, sample, p));
    if (k.has_dy) item.dy = fetch<V>(static_cast<const S*>(k.dy.data) + offset(k.dy, sample, p));
    if (k.read_shift) item.a = fetch<V>(static_cast<const P*>(k.first.data) + offset(k.first, sample, p));
    if (k.read_scale) item.b = fetch<V>(static_cast<const P*>(k.second.data) + offset(k.second, sample, p));
    return item;
  };
  Gains<T, 1> gains;
  gains.clear();
  if (with_gain && seated) gains.set(0, k.gain[c]);
  T dgain = T(0);
  if (k.passing) {
    copy_passing<V, S>(k, k.dy_from, k.dx_to);
    if (k.rebuild) copy_passing<V, S>(k, k.y_from, k.x_to);
  }
  for (uint32_t n = place; n < count; n += k.deal.places) {
    const uint32_t sample = k.deal.positions(p0 + n), p = p0 + n - sample * k.deal.positions.divisor;
    BackwardItem<D, R, V> now = load(sample, p);
    const T dlogdet[1] = {k.dlogdet ? k.dlogdet[(b0 + sample) * k.dlogdet_stride] : T(0)};
    // dx, the rebuilt x, and the gradients of params take the places of what they were made from.
    constexpr int N = kAtOnce<T, V>;
    Pack<P, V> a, b;
#pragma unroll
    for (int h = 0; h < V; h += N) {
      T y[N], dy[N], t[N], r[N];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        y[e] = Storage<D>::load(now.y[h + e]);
        dy[e] = Storage<D>::load(now.dy[h + e]);
      }
      split_params<R, V>(now.a, now.b, h, k.paired, k.scale_leads, t, r);
      dgain += gradients<with_gain>(k.f, k.rebuild, y, dy, t, r, dlogdet, gains, ~0u);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        now.y[h + e] = Storage<D>::store(y[e]);
        now.dy[h + e] = Storage<D>::store(dy[e]);
      }
      join_params<R, V>(t, r, h, k.paired, k.scale_leads, a, b);
    }
    store_pack(static_cast<S*>(k.dx.data) + offset(k.dx, sample, p), now.dy);
    if (k.rebuild) store_pack(static_cast<S*>(k.x.data) + offset(k.x, sample, p), now.y);
    store_pack(static_cast<P*>(k.dfirst.data) + offset(k.dfirst, sample, p), a);
    if (k.f.has_scale) store_pack(static_cast<P*>(k.dsecond.data) + offset(k.dsecond, sample, p), b);
  }
  if (with_gain) write_gains(k.deal, channel, place, seated, dgain, c, row, k.partials);
}

// --- anything: strides, masks, maps, dtypes at run time
// ---------------------------------------------------------------

template <typename T>
struct AnyBackwardArgs {
  Formula<T> f;
  DType data, raw;
  Deal deal;
  bool rebuild;
  View y, dy, dx, x, mask, shift, scale, dshift, dscale;
  const int64_t* channel_map;
  int64_t first, transformed;
  const T* dlogdet;
  int64_t dlogdet_stride;
  const T* gain;
  T* partials;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3) backward_any(const AnyBackwardArgs<T> k) {
  constexpr int N = 2;
  int channel, place;
  k.deal.seat(&channel, &place);
  const int64_t row = blockIdx.x / k.deal.channel_blocks;
  const int64_t c = (blockIdx.x - row * k.deal.channel_blocks) * k.deal.channels + channel;
  const bool seated = channel < k.deal.channels && place < k.deal.places && c < k.deal.all_channels;
  const int64_t begin = row * k.deal.per_block, b0 = begin / k.deal.positions.divisor;
  const uint32_t p0 = static_cast<uint32_t>(begin - b0 * k.deal.positions.divisor);
  const uint32_t count =
      seated ? static_cast<uint32_t>(min_(static_cast<int64_t>(k.deal.per_block), k.deal.all_places - begin)) : 0;
  const int64_t j = seated ? source_of(k.channel_map, k.first, k.transformed, c) : -1;
  Gains<T, 1> gains;
  gains.clear();
  if (k.f.has_gain && j >= 0) gains.set(0, k.gain[j]);
  T dgain = T(0);
  for (uint32_t n = place; n < count; n += N * k.deal.places) {
    T y[N], dy[N], t[N], r[N], dlogdet[N], kept_y[N], kept_dy[N];
    uint32_t live = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      y[e] = dy[e] = t[e] = r[e] = dlogdet[e] = kept_y[e] = kept_dy[e] = T(0);
      const uint32_t at = p0 + n + e * k.deal.places, sample = k.deal.positions(at);
      const int64_t b = b0 + sample, p = at - sample * k.deal.positions.divisor;
      if (n + e * k.deal.places < count) {
        if (k.dy.data) kept_dy[e] = load_any<T>(k.dy.data, k.data, b * k.dy.b + c * k.dy.c + p * k.dy.p);
        kept_y[e] = load_any<T>(k.y.data, k.data, b * k.y.b + c * k.y.c + p * k.y.p);
        const bool on = j >= 0 && (!k.mask.data ||
                                   static_cast<const bool*>(k.mask.data)[b * k.mask.b + c * k.mask.c + p * k.mask.p]);
        if (on) {  // a raw value that is not used must not reach exp
          live |= 1u << e;
          y[e] = kept_y[e];
          dy[e] = kept_dy[e];
          t[e] = load_any<T>(k.shift.data, k.raw, b * k.shift.b + j * k.shift.c + p * k.shift.p);
          if (k.f.has_scale) r[e] = load_any<T>(k.scale.data, k.raw, b * k.scale.b + j * k.scale.c + p * k.scale.p);
          if (k.dlogdet) dlogdet[e] = k.dlogdet[b * k.dlogdet_stride];
        }
      }
    }
    dgain += gradients<true>(k.f, k.rebuild, y, dy, t, r, dlogdet, gains, live);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (n + e * k.deal.places >= count) break;
      const uint32_t at = p0 + n + e * k.deal.places, sample = k.deal.positions(at);
      const int64_t b = b0 + sample, p = at - sample * k.deal.positions.divisor;
      const bool on = live >> e & 1;
      store_any(k.dx.data, k.data, b * k.dx.b + c * k.dx.c + p * k.dx.p, on ? dy[e] : kept_dy[e]);
      if (k.rebuild) store_any(k.x.data, k.data, b * k.x.b + c * k.x.c + p * k.x.p, on ? y[e] : kept_y[e]);
      if (j >= 0) {
        store_any(k.dshift.data, k.raw, b * k.dshift.b + j * k.dshift.c + p * k.dshift.p, on ? t[e] : T(0));
        if (k.f.has_scale)
          store_any(k.dscale.data, k.raw, b * k.dscale.b + j * k.dscale.c + p * k.dscale.p, on ? r[e] : T(0));
      }
    }
  }
  if (k.partials) write_gains(k.deal, channel, place, seated, dgain, c, row, k.partials);
}

}  // namespace
}  // namespace cuda
}  // namespace nf
