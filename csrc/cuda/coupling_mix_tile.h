// A coupling and a channel mix on tiles of columns in shared memory: what coupling_mix's two directions share.
//
// A tile is [channels][pitch] with N neighbouring columns (mix_tile.h), whatever the tensors' layouts and types. The
// coupling works on 16 bytes of neighbouring columns of a row to a thread; log-determinants are summed per column, then
// per sample and tile: sample b's part of tile i is partial i + b, no two of which are the same.
#pragma once

#include "../include/coupling_mix.h"
#include "affine_coupling_math.h"
#include "mix_tensor.h"

namespace nf {
namespace cuda {
namespace {

constexpr int kMixThreads = 128;
constexpr int kMixWarps = kMixThreads / 32;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int round_up(int64_t a, int b) { return static_cast<int>(ceil_div(a, b) * b); }

// The coupling as tiles see it, and how columns are counted.
template <typename T>
struct TiledCoupling {
  Formula<T> formula;
  DType data, raw;
  int channels, transformed, first;
  int step, shift_row, scale_row, params_rows;  // channel j's shift is row j * step + shift_row of params
  const T* gain;
  int64_t columns, positions;  // positions: of a sample as the tensors' views have it (samples may be joined)
  int64_t sample;              // positions of a sample

  TiledCoupling(const Coupling& k, const Columns& counted)
      : formula(k),
        data(k.data),
        raw(k.raw),
        channels(static_cast<int>(k.channels)),
        transformed(static_cast<int>(k.transformed)),
        first(static_cast<int>(k.first)),
        step(static_cast<int>(k.params_step())),
        shift_row(static_cast<int>(k.shift_offset(1))),
        scale_row(static_cast<int>(k.scale_offset(1))),
        params_rows(static_cast<int>(k.transformed) * (k.has_scale() ? 2 : 1)),
        gain(static_cast<const T*>(k.gain)),
        columns(counted.count()),
        positions(counted.positions),
        sample(k.positions) {}
};

// --- tensors of any type ---------------------------------------------------------------------------------------------

// A tensor's tiles and where they stand in shared memory. Kernels go through a list of these: every type and layout is
// compiled once for all that are read, and once for all that are written.
struct Move {
  TileView view;
  DType type;
  int channels, rows;  // rows from `channels` on are zeros
  int tile;            // the tile's first element
};

template <int size>
struct Moves {
  Move list[size] = {};
  int count = 0;

  void add(const Move& move) { list[count++] = move; }
};

template <int N, int pitch, typename T>
NF_DEVICE void load_move(const Move& m, const TilePlace& at, T* shared) {
  T* tile = shared + m.tile;
  if (m.type == DType::f32)
    load_tile<DType::f32, N, T>(m.view, at, m.channels, 0, m.rows, tile, pitch);
  else if (m.type == DType::bf16)
    load_tile<DType::bf16, N, T>(m.view, at, m.channels, 0, m.rows, tile, pitch);
  else if (m.type == DType::f16)
    load_tile<DType::f16, N, T>(m.view, at, m.channels, 0, m.rows, tile, pitch);
  else
    load_tile<DType::f64, N, T>(m.view, at, m.channels, 0, m.rows, tile, pitch);
}

template <int N, int pitch, typename T>
NF_DEVICE void store_move(const Move& m, const TilePlace& at, const T* shared) {
  const T* tile = shared + m.tile;
  if (m.type == DType::f32)
    store_tile<DType::f32, N, T>(m.view, at, m.channels, 0, m.channels, tile, pitch);
  else if (m.type == DType::bf16)
    store_tile<DType::bf16, N, T>(m.view, at, m.channels, 0, m.channels, tile, pitch);
  else if (m.type == DType::f16)
    store_tile<DType::f16, N, T>(m.view, at, m.channels, 0, m.channels, tile, pitch);
  else
    store_tile<DType::f64, N, T>(m.view, at, m.channels, 0, m.channels, tile, pitch);
}

// --- the coupling ----------------------------------------------------------------------------------------------------

template <typename T>
constexpr int kWide = 16 / sizeof(T);  // columns to a thread
template <int N, typename T>
constexpr int kPieces = N / kWide<T>;  // threads to a row
template <int N, typename T>
constexpr int kRowsAtOnce = kMixThreads / kPieces<N, T>;

template <typename T>
NF_DEVICE Gains<T, 1> gain_of(const TiledCoupling<T>& k, int j) {
  Gains<T, 1> gains;
  gains.clear();
  if (k.gain) gains.set(0, k.gain[j]);
  return gains;
}

// x becomes y; log_sums[kRowsAtOnce][N] takes the sums of log s of a thread's rows, column by column.
template <int N, typename T>
NF_DEVICE void couple(const TiledCoupling<T>& k, T* x, const T* params, int pitch, T* log_sums) {
  constexpr int V = kWide<T>;
  const int tid = static_cast<int>(threadIdx.x), col = tid % kPieces<N, T> * V, group = tid / kPieces<N, T>;
  Pack<T, V> sums = {};
#pragma unroll 1
  for (int j = group; j < k.transformed; j += kRowsAtOnce<N, T>) {
    T* at = x + (k.first + j) * pitch + col;
    const T* given = params + j * k.step * pitch + col;
    Pack<T, V> v = load_pack<V>(at);
    const Pack<T, V> t = load_pack<V>(given + k.shift_row * pitch), r = load_pack<V>(given + k.scale_row * pitch);
    T log_s[V];
    transform(k.formula, v.values, t.values, r.values, gain_of(k, j), log_s);
    store_pack<V>(at, v);
#pragma unroll
    for (int e = 0; e < V; ++e) sums[e] += log_s[e];
  }
  store_pack<V>(log_sums + group * N + col, sums);
}

template <int N, typename T>
NF_DEVICE T column_sum(const T* log_sums, int j) {
  T sum = T(0);
#pragma unroll
  for (int g = 0; g < kRowsAtOnce<N, T>; ++g) sum += log_sums[g * N + j];
  return sum;
}

// The log-determinants of a tile's samples, each to partial[tile + sample].
template <int N, typename T>
NF_DEVICE void write_log_sums(const TiledCoupling<T>& k, int64_t tile, const T* log_sums, T* partial) {
  const int64_t n0 = tile * N, n1 = n0 + N < k.columns ? n0 + N : k.columns;
  const int64_t last = (n1 - 1) / k.sample;
  const auto from = [&](int64_t b) { return static_cast<int>(b * k.sample > n0 ? b * k.sample - n0 : 0); };
  const auto to = [&](int64_t b) { return static_cast<int>(((b + 1) * k.sample < n1 ? (b + 1) * k.sample : n1) - n0); };
  if (k.sample < 32) {
    for (int64_t b = n0 / k.sample + threadIdx.x; b <= last; b += kMixThreads) {
      T total = T(0);
      for (int j = from(b); j < to(b); ++j) total += column_sum<N>(log_sums, j);
      partial[tile + b] = total;
    }
    return;
  }
  for (int64_t b = n0 / k.sample + warp(); b <= last; b += kMixWarps) {
    T total = T(0);
    for (int j = from(b) + lane(); j < to(b); j += 32) total += column_sum<N>(log_sums, j);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) total += shuffle_xor(total, step);
    if (lane() == 0) partial[tile + b] = total;
  }
}

// logdet[b] = running[b] + the sum of its parts in the tiles of `width` columns; a warp for each sample.
template <typename T>
__global__ __launch_bounds__(kMixThreads) void sum_log_parts(const T* partial, int64_t batch, int64_t sample, int width,
                                                             const T* running, int64_t running_stride, T* logdet) {
  const int64_t b = blockIdx.x * int64_t{kMixWarps} + warp();
  T total = T(0);
  if (b < batch && sample > 0)
    for (int64_t i = b * sample / width + lane(); i <= ((b + 1) * sample - 1) / width; i += 32) total += partial[i + b];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += shuffle_xor(total, step);
  if (b < batch && lane() == 0) logdet[b] = running ? running[b * running_stride] + total : total;
}

// The coupling's gradient in place: y becomes the rebuilt input where wanted, dy becomes dx, params become dparams.
// `dlogdet` [N] is per column; gains[j], where there are any, grows by channel j's.
template <int N, typename T>
NF_DEVICE void couple_backward(const TiledCoupling<T>& k, bool rebuild, T* y, T* dy, T* params, int pitch,
                               const T* dlogdet, T* gains) {
  constexpr int V = kWide<T>;
  const int tid = static_cast<int>(threadIdx.x), col = tid % kPieces<N, T> * V, group = tid / kPieces<N, T>;
  const Pack<T, V> dl = load_pack<V>(dlogdet + col);
#pragma unroll 1
  for (int start = 0; start < k.transformed; start += kRowsAtOnce<N, T>) {
    const int j = start + group;
    T gain = T(0);
    if (j < k.transformed) {
      T *at = y + (k.first + j) * pitch + col, *grad = dy + (k.first + j) * pitch + col;
      T *shift = params + (j * k.step + k.shift_row) * pitch + col, *raw = shift + (k.scale_row - k.shift_row) * pitch;
      Pack<T, V> v = load_pack<V>(at), g = load_pack<V>(grad), t = load_pack<V>(shift), r = load_pack<V>(raw);
      gain = gradients<true>(k.formula, rebuild, v.values, g.values, t.values, r.values, dl.values, gain_of(k, j), ~0u);
      if (rebuild) store_pack<V>(at, v);
      store_pack<V>(grad, g);
      if (k.formula.has_scale) store_pack<V>(raw, r);
      store_pack<V>(shift, t);
    }
    if (gains) {
#pragma unroll
      for (int step = kPieces<N, T> / 2; step > 0; step /= 2) gain += shuffle_xor(gain, step);
      if (j < k.transformed && col == 0) gains[j] += gain;
    }
  }
}

// --- products --------------------------------------------------------------------------------------------------------

template <int N>
constexpr int kQuads = N / 4;

// A matrix of at most 64 x 64, ready for products with tiles, a row of the tile for each of its columns.
enum class Product { fma, tensor, plain };  // plain: fma with the matrix left in global memory (double)

constexpr int kTensorChannels = 32;  // from here on tensor cores multiply

template <int N, Product how>
constexpr int kPitch = how == Product::tensor ? tile_pitch(N) : N + 4;

template <Product how>
NF_FN int padded_rows(int channels) {
  constexpr int step = how == Product::tensor ? 16 : 4;
  return (channels + step - 1) / step * step;
}

template <Product how, typename T>
struct Matrix {
  const T* data;
  int channels, o, k;  // element (row, k) at row * o + k * this->k where it is in global memory
};

// Elements of shared memory that a matrix takes.
template <Product how>
NF_FN int matrix_size(int channels) {
  return how == Product::plain ? 0
         : how == Product::fma ? channels * ((channels + 3) / 4 * 4)
                               : (channels + 15) / 16 * ((channels + 7) / 8) * 128;
}

template <Product how, typename T>
NF_DEVICE Matrix<how, T> load_matrix(const T* weight, int channels, bool transposed, T* shared) {
  const int tid = static_cast<int>(threadIdx.x);
  if constexpr (how == Product::plain) {
    return {weight, channels, transposed ? 1 : channels, transposed ? channels : 1};
  } else if constexpr (how == Product::fma) {  // [k][rows padded to 4]
    const int pitch = (channels + 3) / 4 * 4;
    for (int i = tid; i < channels * pitch; i += kMixThreads) {
      const int k = i / pitch, row = i % pitch;
      shared[i] = row >= channels ? T(0) : transposed ? weight[k * channels + row] : weight[row * channels + k];
    }
    return {shared, channels, 1, pitch};
  } else {
    const int k_tiles = (channels + 7) / 8;
    for (int i = tid; i < matrix_size<how>(channels); i += kMixThreads)
      shared[i] = fragment_element(weight, channels, transposed, 0, 0, k_tiles, i);
    return {shared, channels, 0, 0};
  }
}

// out = matrix (in - shift) + bias for four rows by four columns to a thread.
template <int N, bool shifted, Product how, typename T>
NF_DEVICE void multiply_fma(const Matrix<how, T>& m, const T* in, const T* shift, const T* bias, T* out, int pitch) {
  constexpr int R = 4;
  const int items = (m.channels + R - 1) / R * kQuads<N>;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < items; item += kMixThreads) {
    const int col = item % kQuads<N> * 4, row = item / kQuads<N> * R;
    T acc[R][4];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[r][e] = T(0);
#pragma unroll 2
    for (int k = 0; k < m.channels; ++k) {
      Pack<T, 4> v = load_pack<4>(in + k * pitch + col);
      if constexpr (shifted) {
        const T s = shift[k];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] -= s;
      }
      Pack<T, R> w;
      if constexpr (how == Product::fma) {
        w = load_pack<R>(m.data + k * m.k + row);
      } else {
#pragma unroll
        for (int r = 0; r < R; ++r) w[r] = m.data[(row + r < m.channels ? row + r : m.channels - 1) * m.o + k * m.k];
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[r][e] += w[r] * v[e];
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row + r < m.channels) {
        const T start = bias ? bias[row + r] : T(0);
        Pack<T, 4> v;
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = acc[r][e] + start;
        store_pack<4>(out + (row + r) * pitch + col, v);
      }
    }
  }
}

// The same by tensor cores: a warp takes half the columns and half the fragments' rows.
template <int N, int M, bool shifted>
NF_DEVICE void multiply_fragments(const Matrix<Product::tensor, float>& m, int m_tile, const float* in,
                                  const float* shift, const float* bias, float* out, int pitch) {
  const int k_tiles = (m.channels + 7) / 8, col = warp() % 2 * (N / 2);
  float acc[M][N / 16][4] = {};
  multiply_tile<shifted>(m.data + m_tile * k_tiles * 128, k_tiles, in + col, pitch, shift, acc);
  write_fragments<M, N / 16>(acc, out + m_tile * 16 * pitch + col, pitch, bias ? bias + m_tile * 16 : nullptr);
}

// out = matrix (in - shift) + bias; the tiles differ. `shift` and `bias` (or null) are padded to 64.
template <int N, bool shifted, Product how, typename T>
NF_DEVICE void multiply(const Matrix<how, T>& m, const T* in, const T* shift, const T* bias, T* out, int pitch) {
  if constexpr (how == Product::tensor) {
    const int m_tiles = (m.channels + 15) / 16, upper = (m_tiles + 1) / 2;
    const int m_tile = warp() / 2 * upper, count = warp() / 2 ? m_tiles - upper : upper;
    if (count == 2)
      multiply_fragments<N, 2, shifted>(m, m_tile, in, shift, bias, out, pitch);
    else
      multiply_fragments<N, 1, shifted>(m, m_tile, in, shift, bias, out, pitch);
  } else {
    multiply_fma<N, shifted>(m, in, shift, bias, out, pitch);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace nf
