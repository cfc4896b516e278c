// Where the columns (positions of all samples) of a channel mix lie: tiles [C, kTile] packed from any layout and type,
// and how columns are cut into tiles and tiles into chunks.
#pragma once

#include "convert.h"
#include "mix_tile.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kChunks = 64;        // partial dW at most
constexpr int64_t kTilesPerChunk = 8;  // what a chunk's lane sums cost is then a few percent
constexpr int64_t kWork = 1 << 18;     // multiply-adds worth a thread

// Calls f(sample, first position, first column in the tile, length) for the stretches that columns [n0, n1) are made
// of.
template <typename F>
void stretches(int64_t n0, int64_t n1, int64_t positions, F&& f) {
  for (int64_t n = n0; n < n1;) {
    const int64_t b = n / positions, p = n % positions;
    const int64_t length = n1 - n < positions - p ? n1 - n : positions - p;
    f(b, p, n - n0, length);
    n += length;
  }
}

// tile[c, n] = v for channels x columns [n0, n1), zero up to kTile: padding columns multiply into nothing.
template <typename T, DType d>
void pack(const View& v, int64_t channels, int64_t positions, int64_t n0, int64_t n1, T* tile) {
  const auto* base = static_cast<const typename Storage<d>::type*>(v.data);
  stretches(n0, n1, positions, [&](int64_t b, int64_t p, int64_t at, int64_t length) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto* from = base + b * v.b + c * v.c + p * v.p;
      T* to = tile + c * kTile + at;
      if (v.p == 1)
        for (int64_t i = 0; i < length; ++i) to[i] = static_cast<T>(Storage<d>::load(from[i]));
      else
        for (int64_t i = 0; i < length; ++i) to[i] = static_cast<T>(Storage<d>::load(from[i * v.p]));
    }
  });
  if (n1 - n0 < kTile)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = n1 - n0; i < kTile; ++i) tile[c * kTile + i] = T(0);
}

template <typename T, DType d>
void unpack(const View& v, int64_t channels, int64_t positions, int64_t n0, int64_t n1, const T* tile) {
  auto* base = static_cast<typename Storage<d>::type*>(v.data);
  stretches(n0, n1, positions, [&](int64_t b, int64_t p, int64_t at, int64_t length) {
    for (int64_t c = 0; c < channels; ++c) {
      auto* to = base + b * v.b + c * v.c + p * v.p;
      const T* from = tile + c * kTile + at;
      if (v.p == 1)
        for (int64_t i = 0; i < length; ++i) to[i] = Storage<d>::store(from[i]);
      else
        for (int64_t i = 0; i < length; ++i) to[i * v.p] = Storage<d>::store(from[i]);
    }
  });
}

template <typename T>
struct Packing {
  void (*pack)(const View&, int64_t, int64_t, int64_t, int64_t, T*);
  void (*unpack)(const View&, int64_t, int64_t, int64_t, int64_t, const T*);
};

template <typename T>
Packing<T> packing_for(DType d) {
  static const Packing<T> table[] = {{pack<T, DType::f32>, unpack<T, DType::f32>},
                                     {pack<T, DType::f64>, unpack<T, DType::f64>},
                                     {pack<T, DType::bf16>, unpack<T, DType::bf16>},
                                     {pack<T, DType::f16>, unpack<T, DType::f16>}};
  return table[static_cast<int>(d)];
}

template <typename T>
constexpr DType native() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

// Columns are cut into tiles (never across samples where they are used in place) and tiles into chunks.
struct Plan {
  bool in_place;
  int64_t columns, per_sample, tiles, chunks;

  // `step`: columns that are computed at once.
  template <typename T>
  static Plan make(DType data, int64_t batch, int64_t positions, const View* const* views, int n,
                   int step = group<T>()) {
    Plan plan;
    plan.columns = batch * positions;
    plan.in_place = data == native<T>() && positions > 0 && positions % step == 0;
    for (int i = 0; i < n; ++i) plan.in_place = plan.in_place && views[i]->p == 1;
    plan.per_sample = plan.in_place ? (positions + kTile - 1) / kTile : 0;
    plan.tiles = plan.in_place ? batch * plan.per_sample : (plan.columns + kTile - 1) / kTile;
    plan.chunks = (plan.tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    if (plan.chunks > kChunks) plan.chunks = kChunks;
    return plan;
  }

  // First column and column count of a tile.
  void tile(int64_t i, int64_t positions, int64_t* n0, int* count) const {
    const int64_t end = in_place ? positions : columns, at = (in_place ? i % per_sample : i) * kTile;
    *n0 = (in_place ? i / per_sample * positions : 0) + at;
    *count = static_cast<int>(end - at < kTile ? end - at : kTile);
  }
  int64_t grain(int64_t units, int64_t work) const {
    return work >= units * kWork ? 1 : (units * kWork) / (work + 1) + 1;
  }
};

template <typename T>
T* column(const View& v, int64_t n, int64_t positions) {
  return static_cast<T*>(v.data) + n / positions * v.b + n % positions * v.p;
}

template <typename T>
int padded(int count) {
  return (count + group<T>() - 1) / group<T>() * group<T>();
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
