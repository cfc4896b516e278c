// Tiles of columns in shared memory, for the channel mix and for what is fused with it.
//
// A column is one position of one sample; columns are counted over all samples. A tile holds `channels x N`
// neighbouring columns as [channels][pitch] in the arithmetic's type, whatever the tensor's layout and type, zero where
// the tensor has neither channel nor column. All of a block's threads move a tile together: a power of two of
// them, and no fewer than a row of N elements has 16-byte pieces.
#pragma once

#include <type_traits>

#include "storage.h"

namespace nf {

template <DType d>
using Arithmetic = typename std::conditional<d == DType::f64, double, float>::type;

// How a tensor's tiles are read and written. The wide ways use 16-byte accesses.
enum class Way : int { positions_wide, positions, channels_wide, channels };

struct TileView {
  void* data;
  int64_t b, c, p;
  Way way;
};

struct Columns {
  int64_t batch, positions;
  int64_t count() const { return batch * positions; }
};

// Samples that lie one behind the other in every tensor (channels-last, tables, batches of one) are one long sample.
inline Columns join_samples(Columns columns, View* const* views, int n) {
  bool joined = true;
  for (int i = 0; i < n; ++i) {
    if (columns.positions == 1) views[i]->p = views[i]->b;
    joined = joined && (columns.batch == 1 || views[i]->b == columns.positions * views[i]->p);
  }
  return joined ? Columns{1, columns.batch * columns.positions} : columns;
}

inline TileView tile_view(const View& v, DType type, int64_t channels, const Columns& columns) {
  const int64_t wide = 16 / size_of(type);
  const bool aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && (columns.batch == 1 || v.b % wide == 0);
  Way way = v.c < v.p && channels > 1 ? Way::channels : Way::positions;
  if (aligned && v.p == 1 && columns.positions % wide == 0 && (channels == 1 || v.c % wide == 0))
    way = Way::positions_wide;
  else if (aligned && v.c == 1 && channels % wide == 0 && (columns.positions == 1 || v.p % wide == 0))
    way = Way::channels_wide;
  return {v.data, v.b, v.c, v.p, way};
}

// Sample and position of a tile's first column.
struct TilePlace {
  int64_t b, p, positions;
  int64_t left;  // columns from here to the last
};

NF_DEVICE TilePlace tile_place(int64_t first, int64_t count, int64_t positions) {
  TilePlace at;
  if ((first | positions) >> 32 == 0) {  // a 64-bit division is a function call
    at.b = static_cast<uint32_t>(first) / static_cast<uint32_t>(positions);
    at.p = static_cast<uint32_t>(first) % static_cast<uint32_t>(positions);
  } else {
    at.b = first / positions;
    at.p = first % positions;
  }
  at.positions = positions;
  at.left = count - first;
  return at;
}

// Where the tile's column j begins; j < 4096.
NF_DEVICE int64_t column_offset(const TileView& v, const TilePlace& at, int j) {
  int64_t b = at.b, p = at.p + j;
  if (p >= at.positions) {
    const int samples = at.positions > 4096 ? 1 : static_cast<int>(p) / static_cast<int>(at.positions);
    b += samples;
    p -= samples * at.positions;
  }
  return b * v.b + p * v.p;
}

// Calls f(channel of the tile, its column, offset of that element, true if it exists) for each piece of a tile that a
// thread moves: V elements along the positions or along the channels, or one. Wide rows and columns of a tensor exist
// as a whole or not at all; `along` tells f which of the two a piece runs along.
template <int N, int V, typename F>
NF_DEVICE void for_each_piece(const TileView& v, const TilePlace& at, int64_t channels, int64_t first_channel, int rows,
                              F&& f) {
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (v.way == Way::positions_wide) {
    constexpr int Q = N / V;
    const int j = tid % Q * V;
    const int64_t from = column_offset(v, at, j) + first_channel * v.c;
    const bool exists = j < at.left;
#pragma unroll 4
    for (int r = tid / Q; r < rows; r += threads / Q)
      f(std::integral_constant<int, V>{}, std::false_type{}, r, j, from + r * v.c,
        exists && first_channel + r < channels);
  } else if (v.way == Way::positions) {
    const int across = threads < N ? threads : N;
    for (int j = tid % across; j < N; j += across) {
      const int64_t from = column_offset(v, at, j) + first_channel * v.c;
      const bool exists = j < at.left;
#pragma unroll 2
      for (int r = tid / across; r < rows; r += threads / across)
        f(std::integral_constant<int, 1>{}, std::false_type{}, r, j, from + r * v.c,
          exists && first_channel + r < channels);
    }
  } else if (v.way == Way::channels_wide) {
    // A warp takes 16 columns by two pieces: whole sectors of memory, and two to a bank of shared memory.
    for (int j = tid / 2; j < N; j += threads / 2) {
      const int64_t from = column_offset(v, at, j) + first_channel;
      const bool exists = j < at.left;
#pragma unroll 2
      for (int r = tid % 2 * V; r < rows; r += 2 * V)
        f(std::integral_constant<int, V>{}, std::true_type{}, r, j, from + r, exists && first_channel + r < channels);
    }
  } else {
    for (int j = tid / 8; j < N; j += threads / 8) {  // eight channels by four columns to a warp
      const int64_t from = column_offset(v, at, j) + first_channel * v.c;
      const bool exists = j < at.left;
#pragma unroll 2
      for (int r = tid % 8; r < rows; r += 8)
        f(std::integral_constant<int, 1>{}, std::true_type{}, r, j, from + r * v.c,
          exists && first_channel + r < channels);
    }
  }
}

// Which row of a tile a channel has.
struct InOrder {
  NF_DEVICE int operator()(int row) const { return row; }
};

// tile[place(r)][j] = v[first_channel + r, column j] for r < rows, j < N. Data in the arithmetic's type is copied
// asynchronously where it need not be turned: copy_commit, copy_wait and a barrier are the caller's.
template <DType d, int N, typename T = Arithmetic<d>, typename Place = InOrder>
NF_DEVICE void load_tile(const TileView& v, const TilePlace& at, int64_t channels, int64_t first_channel, int rows,
                         T* tile, int pitch, const Place& place = Place()) {
  using S = StorageType<d>;
  constexpr int W = 16 / sizeof(S);
  const S* data = static_cast<const S*>(v.data);
  for_each_piece<N, W>(v, at, channels, first_channel, rows,
                       [&](auto size, auto down, int r, int j, int64_t offset, bool exists) {
                         constexpr int V = decltype(size)::value;
                         constexpr bool turned = decltype(down)::value && V > 1;
                         const S* from = exists ? data + offset : data;
                         T* to = tile + place(r) * pitch + j;
                         if constexpr (std::is_same<S, T>::value && !turned) {
                           copy_async<sizeof(S) * V>(to, from, exists);
                         } else {
                           T values[V] = {};
                           if (exists) {
                             if constexpr (V > 1) {
                               const Pack<S, V> pack = load_pack<V>(from);
#pragma unroll
                               for (int e = 0; e < V; ++e) values[e] = Storage<d>::load(pack[e]);
                             } else {
                               values[0] = Storage<d>::load(*from);
                             }
                           }
                           if constexpr (turned) {
#pragma unroll
                             for (int e = 0; e < V; ++e)
                               if (r + e < rows) tile[place(r + e) * pitch + j] = values[e];
                           } else if constexpr (V > 1) {
                             Pack<T, V> pack;
#pragma unroll
                             for (int e = 0; e < V; ++e) pack[e] = values[e];
                             store_pack<V>(to, pack);
                           } else {
                             *to = values[0];
                           }
                         }
                       });
}

// The reverse, for the elements that exist.
template <DType d, int N, typename T = Arithmetic<d>, typename Place = InOrder>
NF_DEVICE void store_tile(const TileView& v, const TilePlace& at, int64_t channels, int64_t first_channel, int rows,
                          const T* tile, int pitch, const Place& place = Place()) {
  using S = StorageType<d>;
  constexpr int W = 16 / sizeof(S);
  S* data = static_cast<S*>(v.data);
  for_each_piece<N, W>(v, at, channels, first_channel, rows,
                       [&](auto size, auto down, int r, int j, int64_t offset, bool exists) {
                         constexpr int V = decltype(size)::value;
                         constexpr bool turned = decltype(down)::value && V > 1;
                         const T* from = tile + place(r) * pitch + j;
                         if (!exists) return;
                         if constexpr (V > 1) {
                           Pack<S, V> pack;
                           if constexpr (turned) {
#pragma unroll
                             for (int e = 0; e < V; ++e)
                               pack[e] = Storage<d>::store(r + e < rows ? tile[place(r + e) * pitch + j] : T(0));
                           } else {
                             const Pack<T, V> values = load_pack<V>(from);
#pragma unroll
                             for (int e = 0; e < V; ++e) pack[e] = Storage<d>::store(values[e]);
                           }
                           store_pack<V>(data + offset, pack);
                         } else {
                           data[offset] = Storage<d>::store(*from);
                         }
                       });
}

// --- second stages: partial sums [partials][columns] in a fixed order ------------------------------------------------

// Partial sums are cut for this many multiprocessors (a Hopper's), whatever GPU runs: the same bits on all of them.
constexpr int64_t kMultiprocessors = 132;

// Some of the partial sums' columns, and the array their sums go to: null where nobody asks for them.
struct SumsTo {
  void* out;
  int64_t columns;
};

template <typename T>
struct SumParts {
  T* out[3];
  int64_t first[3], columns[3];  // in the partial sums
};

constexpr int kMostSumThreads = 1024;

// 32 columns to a block, every so many partials to a warp. Call through sum_partials below.
template <typename T>
__global__ __launch_bounds__(kMostSumThreads) void sum_partials_kernel(const T* partial, int64_t partials,
                                                                       int64_t stride, SumParts<T> to) {
  constexpr int ahead = 8;  // loads in flight
  NF_SHARED(T, sums);       // [warps][32]
  const int warps = static_cast<int>(blockDim.x) / 32;
  int64_t i = blockIdx.x * int64_t{32} + lane(), column = 0;
  T* out = nullptr;
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    if (i >= 0 && i < to.columns[part]) {
      out = to.out[part] + i;
      column = to.first[part] + i;
    }
    i -= to.columns[part];
  }
  T sum = 0;
  if (out) {
#pragma unroll 1
    for (int64_t g = warp(); g < partials; g += ahead * warps) {
      T values[ahead];
#pragma unroll
      for (int u = 0; u < ahead; ++u)
        values[u] = g + u * warps < partials ? partial[(g + u * warps) * stride + column] : T(0);
#pragma unroll
      for (int u = 0; u < ahead; ++u) sum += values[u];
    }
  }
  sums[threadIdx.x] = sum;
  sync_block();
  if (warp() == 0 && out) {
#pragma unroll 8
    for (int w = 1; w < warps; ++w) sum += sums[w * 32 + lane()];
    *out = sum;
  }
}

// Sums over the partials, of all columns in one launch: the parts' columns lie one behind the other. Zeros where there
// are no partials.
template <typename T>
void sum_partials(const Launch& on, const T* partial, int64_t partials, SumsTo a, SumsTo b, SumsTo c = {nullptr, 0}) {
  const SumsTo parts[] = {a, b, c};
  SumParts<T> to;
  int64_t stride = 0, wanted = 0;
  for (int part = 0; part < 3; ++part) {
    to.out[part] = static_cast<T*>(parts[part].out);
    to.first[part] = stride;
    to.columns[part] = parts[part].out ? parts[part].columns : 0;
    stride += parts[part].columns;
    wanted += to.columns[part];
  }
  const int threads = partials > 64 ? kMostSumThreads : 256;
  launch(sum_partials_kernel<T>, on, (wanted + 31) / 32, threads, threads * sizeof(T), partial, partials, stride, to);
}

}  // namespace nf
