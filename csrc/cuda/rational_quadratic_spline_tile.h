// How a spline's elements are dealt to blocks, and how a block's params get to shared memory and their gradients back.
//
// A block takes up to 128 transformed elements, a thread each: of whole samples if they are small, else a part of one.
// All their params are in shared memory at once, brought with 16-byte copies that overtake the arithmetic of other
// blocks. Rows: an element's params follow each other (tables, channels-last). Planes: a raw value's positions do
// (images, sequences), and elements are `width` apart from their next value in shared memory.
#pragma once

#include "../include/rational_quadratic_spline.h"
#include "affine_coupling_forward.h"

namespace nf {
namespace cuda {
namespace {

constexpr int kSplineThreads = 128;

// How a tile's params are moved: one run of memory, rows of planes by 16 bytes, or value by value through strides.
enum class Move : int { span, rows, values };

struct SplineTile {
  uint32_t samples, width, channels;  // of a tile; several samples or channels only if the axes within are whole
  uint32_t tiles_w, tiles_j, pieces;  // tiles along a sample's positions and channels, and their product
  uint32_t elements;                  // samples * width * channels
  uint32_t count, pitch;              // raw values of an element, and how far apart elements lie in shared memory
  Divider by_inner, by_middle, by_pieces, by_tiles_j, by_width, by_passing, by_chunks, by_planes;
  uint32_t passing;  // data channels that a tile looks after if they are not transformed
  int log_team;      // threads that add up one sample
  int64_t batch, positions, data_channels, transformed;
  const int64_t* channel_map;
  DType raw;
};

// A block's tile: where it starts and how much of it there is.
struct SplinePlace {
  int64_t b0, p0, j0;
  uint32_t samples, width, channels, tile_j;

  NF_DEVICE explicit SplinePlace(const SplineTile& k) {
    const uint32_t group = k.pieces == 1 ? blockIdx.x : k.by_pieces(blockIdx.x);
    const uint32_t piece = blockIdx.x - group * k.pieces, tile_w = k.by_tiles_j(piece);
    tile_j = piece - tile_w * k.tiles_j;
    b0 = static_cast<int64_t>(group) * k.samples;
    p0 = static_cast<int64_t>(tile_w) * k.width;
    j0 = static_cast<int64_t>(tile_j) * k.channels;
    samples = static_cast<uint32_t>(min_(static_cast<int64_t>(k.samples), k.batch - b0));
    width = static_cast<uint32_t>(min_(static_cast<int64_t>(k.width), k.positions - p0));
    channels = static_cast<uint32_t>(min_(static_cast<int64_t>(k.channels), k.transformed - j0));
  }
};

// Element e of a tile: sample, position and channel within it.
template <bool planes>
struct SplineElement {
  uint32_t s, w, j;
  bool exists;

  NF_DEVICE SplineElement(const SplineTile& k, const SplinePlace& at, uint32_t e) {
    const uint32_t outer = k.by_inner(e), inner = e - outer * k.by_inner.divisor;
    s = k.by_middle(outer);
    const uint32_t middle = outer - s * k.by_middle.divisor;
    w = planes ? inner : middle;
    j = planes ? middle : inner;
    exists = s < at.samples && w < at.width && j < at.channels;
  }
  // Where its raw values start in shared memory.
  NF_DEVICE uint32_t start(const SplineTile& k, uint32_t e) const {
    return planes ? (s * k.channels + j) * k.count * k.width + w : e * k.pitch;
  }
};

// Params, or their gradients, and how they are moved.
struct SplineParams {
  View view;
  Move move;
};

template <typename S>
NF_DEVICE uint32_t misplaced(const void* address) {  // elements past a multiple of 16 bytes
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) % 16) / sizeof(S);
}

template <typename S>
NF_DEVICE S* tile_params(const SplineParams& params, const SplinePlace& at, uint32_t count) {
  return static_cast<S*>(params.view.data) +
         (at.b0 * params.view.b + at.j0 * count * params.view.c + at.p0 * params.view.p);
}

NF_DEVICE uint32_t tile_values(const SplineTile& k, const SplinePlace& at) {
  return at.samples * at.width * at.channels * k.count;
}

// Visits the rows of planes by 16 bytes: f(offset in the tile's params, offset in shared memory).
template <int V, typename F>
NF_DEVICE void visit_rows(const SplineTile& k, const SplinePlace& at, const View& view, F&& f) {
  const uint32_t planes = at.samples * at.channels * k.count, chunks = planes * k.by_chunks.divisor;
  for (uint32_t n = threadIdx.x; n < chunks; n += blockDim.x) {
    const uint32_t row = k.by_chunks(n), w = (n - row * k.by_chunks.divisor) * V;
    const uint32_t s = k.samples == 1 ? 0 : k.by_planes(row), plane = row - s * k.by_planes.divisor;
    if (w < at.width) f(s * view.b + plane * view.c + w, row * k.width + w);
  }
}

// Visits a tile value by value, neighbouring lanes along what is next to each other: f(offset, offset in shared
// memory).
template <bool planes, typename F>
NF_DEVICE void visit_values(const SplineTile& k, const SplinePlace& at, const View& view, F&& f) {
  if constexpr (planes) {
    const SplineElement<true> e(k, at, threadIdx.x);
    if (!e.exists) return;
    const int64_t from = e.s * view.b + (e.j * k.count) * view.c + e.w * view.p;
    const uint32_t to = e.start(k, threadIdx.x);
#pragma unroll 4
    for (uint32_t i = 0; i < k.count; ++i) f(from + i * view.c, to + i * k.width);
  } else {
    for (uint32_t n = warp(); n < k.elements; n += blockDim.x / 32) {
      const SplineElement<false> e(k, at, n);
      if (!e.exists) continue;
      const int64_t from = e.s * view.b + (e.j * k.count) * view.c + e.w * view.p;
      for (uint32_t i = lane(); i < k.count; i += 32) f(from + i * view.c, n * k.pitch + i);
    }
  }
}

// Starts to copy a tile's params to shared memory (16-byte aligned, the first value at `shift`). They are there after
// copy_wait<0> and a barrier.
template <DType R, bool planes>
NF_DEVICE void bring_tile(const SplineTile& k, const SplinePlace& at, const SplineParams& params,
                          StorageType<R>* shared, uint32_t shift) {
  using S = StorageType<R>;
  constexpr uint32_t V = 16 / sizeof(S);
  const S* from = tile_params<const S>(params, at, k.count);
  if (params.move == Move::span) {
    const uint32_t values = tile_values(k, at), head = min_(shift ? V - shift : 0u, values);
    const uint32_t chunks = (values - head) / V, tail = head + chunks * V;
    S* to = shared + shift;
    if (threadIdx.x < head) to[threadIdx.x] = from[threadIdx.x];
    for (uint32_t n = threadIdx.x; n < chunks; n += blockDim.x) copy_async<16>(to + head + n * V, from + head + n * V);
    if (threadIdx.x < values - tail) to[tail + threadIdx.x] = from[tail + threadIdx.x];
  } else if (params.move == Move::rows) {
    visit_rows<V>(k, at, params.view, [&](int64_t i, uint32_t to) { copy_async<16>(shared + to, from + i); });
  } else if (R == k.raw) {
    visit_values<planes>(k, at, params.view, [&](int64_t i, uint32_t to) {
      if constexpr (sizeof(S) >= 4)
        copy_async<sizeof(S)>(shared + shift + to, from + i);
      else
        shared[shift + to] = from[i];
    });
  } else if constexpr (R == DType::f64) {  // wider arithmetic than params
    const int64_t start = at.b0 * params.view.b + at.j0 * k.count * params.view.c + at.p0 * params.view.p;
    visit_values<planes>(k, at, params.view, [&](int64_t i, uint32_t to) {
      shared[shift + to] = load_any<double>(params.view.data, k.raw, start + i);
    });
  }
  copy_commit();
}

// The reverse, for gradients; after a barrier.
template <DType R, bool planes>
NF_DEVICE void send_tile(const SplineTile& k, const SplinePlace& at, const SplineParams& params,
                         const StorageType<R>* shared, uint32_t shift) {
  using S = StorageType<R>;
  constexpr uint32_t V = 16 / sizeof(S);
  S* to = tile_params<S>(params, at, k.count);
  if (params.move == Move::span) {
    const uint32_t values = tile_values(k, at);
    const bool alike = misplaced<S>(to) == shift;
    const uint32_t head = alike ? min_(shift ? V - shift : 0u, values) : values;
    const uint32_t chunks = (values - head) / V, tail = head + chunks * V;
    const S* from = shared + shift;
    for (uint32_t n = threadIdx.x; n < head; n += blockDim.x) to[n] = from[n];
    for (uint32_t n = threadIdx.x; n < chunks; n += blockDim.x)
      store_pack(to + head + n * V, load_pack<V>(from + head + n * V));
    if (threadIdx.x < values - tail) to[tail + threadIdx.x] = from[tail + threadIdx.x];
  } else if (params.move == Move::rows && shift == 0) {
    visit_rows<V>(k, at, params.view,
                  [&](int64_t i, uint32_t from) { store_pack(to + i, load_pack<V>(shared + from)); });
  } else if (R == k.raw) {
    visit_values<planes>(k, at, params.view, [&](int64_t i, uint32_t from) { to[i] = shared[shift + from]; });
  } else if constexpr (R == DType::f64) {
    const int64_t start = at.b0 * params.view.b + at.j0 * k.count * params.view.c + at.p0 * params.view.p;
    visit_values<planes>(k, at, params.view, [&](int64_t i, uint32_t from) {
      store_any<double>(params.view.data, k.raw, start + i, shared[shift + from]);
    });
  }
}

// Where the first value of a tile goes in shared memory, so that 16-byte copies are aligned at both ends.
template <typename S>
NF_DEVICE uint32_t shift_of(const SplineTile& k, const SplinePlace& at, const SplineParams& params) {
  return params.move == Move::span ? misplaced<S>(tile_params<S>(params, at, k.count)) : 0;
}

// The data channel of each of the tile's params channels, -1: none. For a map; ends with a barrier.
NF_DEVICE void invert_map(const SplineTile& k, const SplinePlace& at, int* channel_of) {
  for (uint32_t j = threadIdx.x; j < k.channels; j += blockDim.x) channel_of[j] = -1;
  sync_block();
  for (int64_t c = threadIdx.x; c < k.data_channels; c += blockDim.x) {
    const int64_t j = k.channel_map[c] - at.j0;
    if (j >= 0 && j < at.channels) channel_of[j] = static_cast<int>(c);
  }
  sync_block();
}

// f(sample of the tile, channel, position of the tile) of elements that pass through: the tile's share of them.
template <typename F>
NF_DEVICE void visit_passing(const SplineTile& k, const SplinePlace& at, const int* channel_of, bool along, F&& f) {
  const uint32_t all = at.samples * k.width * k.passing;
  for (uint32_t n = threadIdx.x; n < all; n += blockDim.x) {
    const uint32_t outer = along ? k.by_width(n) : k.by_passing(n);
    const uint32_t inner = n - outer * (along ? k.width : k.passing);
    const uint32_t s = along ? k.by_passing(outer) : k.by_width(outer);
    const uint32_t middle = outer - s * (along ? k.passing : k.width);
    const uint32_t w = along ? inner : middle;
    const int64_t c = static_cast<int64_t>(at.tile_j) * k.passing + (along ? middle : inner);
    if (c >= k.data_channels || w >= at.width) continue;
    const int64_t j = k.channel_map[c];
    if (j < 0 || j >= k.transformed) f(s, c, w);
  }
  // A map that names a params channel twice is the caller's error; it must not show uninitialised memory.
  for (int64_t c = threadIdx.x; c < k.data_channels; c += blockDim.x) {
    const int64_t j = k.channel_map[c] - at.j0;
    if (j >= 0 && j < at.channels && channel_of[j] != c)
      for (uint32_t s = 0; s < at.samples; ++s)
        for (uint32_t w = 0; w < at.width; ++w) f(s, c, w);
  }
}

// --- host ------------------------------------------------------------------------------------------------------------

struct SplinePlan {
  SplineTile tile{};
  bool planes = false;
  int64_t blocks = 0;
  int threads = 0;
  size_t shared_map = 0, shared_sums = 0, shared_raw = 0;  // bytes, each a multiple of 16

  size_t shared() const { return shared_map + shared_sums + shared_raw; }
};

inline int64_t balanced(int64_t n, int64_t most, int64_t unit) {  // the size of n's parts, alike, of at most `most`
  const int64_t parts = divide_up(n, most), part = divide_up(n, parts);
  return min_(divide_up(part, unit) * unit, most);
}

// `stored`: the dtype in shared memory. `arithmetic`: bytes. The plan depends on shapes and strides, not on the batch.
inline SplinePlan plan_spline(const SplineForm& k, const View& params, DType stored, int64_t arithmetic) {
  SplinePlan plan;
  SplineTile& t = plan.tile;
  const int64_t count = k.count(), size = size_of(stored);
  plan.planes = k.positions > 1 && params.p == 1 && params.c != 1;
  int64_t most = kSplineThreads;
  while (most > 32 && most * count * size > 40 * 1024) most /= 2;
  const int64_t transformed = k.transformed < 1 ? 1 : k.transformed;  // none: the others still pass through
  int64_t samples = 1, width = 1, channels = 1;
  if (plan.planes) {
    width = balanced(k.positions, most, 16 / size);
    if (width >= k.positions) width = k.positions;
    if (width == k.positions) channels = balanced(transformed, most / width, 1);
  } else {
    channels = balanced(transformed, most, 1);
    if (channels == transformed) width = balanced(k.positions, most / channels, 1);
  }
  if (channels == transformed && width == k.positions) samples = most / (width * channels);
  t.samples = static_cast<uint32_t>(samples);
  t.width = static_cast<uint32_t>(width);
  t.channels = static_cast<uint32_t>(channels);
  const int64_t tiles_w = divide_up(k.positions, width), tiles_j = divide_up(transformed, channels);
  plan.blocks = divide_up(k.batch, samples) * tiles_w * tiles_j;
  if (tiles_w * tiles_j >= kSmall || k.channels >= kSmall)
    throw std::runtime_error("nfkernels: rational_quadratic_spline: a sample has more than 2^30 parts or channels");
  t.tiles_w = static_cast<uint32_t>(tiles_w);
  t.tiles_j = static_cast<uint32_t>(tiles_j);
  t.pieces = static_cast<uint32_t>(tiles_w * tiles_j);
  t.elements = static_cast<uint32_t>(samples * width * channels);
  t.count = static_cast<uint32_t>(count);
  // Elements whose starts share few banks are put one value further apart.
  t.pitch = static_cast<uint32_t>(!plan.planes && count % 4 == 0 ? count + 1 : count);
  t.by_inner = Divider(plan.planes ? width : channels);
  t.by_middle = Divider(plan.planes ? channels : width);
  t.by_pieces = Divider(t.pieces);
  t.by_tiles_j = Divider(tiles_j);
  t.by_width = Divider(width);
  t.passing = static_cast<uint32_t>(divide_up(k.channels, tiles_j));
  t.by_passing = Divider(t.passing);
  t.by_chunks = Divider(divide_up(width * size, 16));
  t.by_planes = Divider(channels * count);
  plan.threads = static_cast<int>(divide_up(t.elements, 32) * 32);
  while (t.log_team < 5 && (t.samples << (t.log_team + 1)) <= static_cast<uint32_t>(plan.threads)) ++t.log_team;
  t.batch = k.batch;
  t.positions = k.positions;
  t.data_channels = k.channels;
  t.transformed = k.transformed;
  t.channel_map = k.channel_map;
  t.raw = k.raw;
  plan.shared_map = k.channel_map ? divide_up(channels * sizeof(int), 16) * 16 : 0;
  plan.shared_sums = plan.threads * arithmetic;
  plan.shared_raw = divide_up(t.elements * t.pitch * size, 16) * 16 + 16;
  return plan;
}

inline SplineParams moved_params(const SplineForm& k, const SplinePlan& plan, const View& v, DType stored) {
  const SplineTile& t = plan.tile;
  const int64_t count = k.count(), width = k.transformed * count, vector = 16 / size_of(stored);
  const auto whole = [&](int64_t n) { return n % vector == 0; };
  Move move = Move::values;
  if (k.raw == stored && t.pitch == t.count) {
    const bool along = plan.planes;
    const int64_t outer = width * k.positions;
    bool span = along ? v.p == 1 && t.width == k.positions && (t.channels * count == 1 || v.c == k.positions)
                      : (width == 1 || v.c == 1) && (t.width == 1 || v.p == width);
    span = span && (t.samples == 1 || k.batch == 1 || v.b == outer);
    if (span)
      move = Move::span;
    else if (along && v.p == 1 && whole(k.positions) && whole(t.width) && whole(v.c) && whole(v.b) &&
             multiple(v.data, 16))
      move = Move::rows;
  }
  return {v, move};
}

}  // namespace
}  // namespace cuda
}  // namespace nf
