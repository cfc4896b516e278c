// The inverse of a masked autoregressive layer on the CPU: registers hold a tile of samples, one unit of the network
// after another is a sum over the units it sees, and each is computed once, when its degree has its turn.
//
// How a tile is cut depends on the batch alone and every sum runs in the units' order, so results depend neither on
// threads nor on the tile.

#include "../include/autoregressive_inverse.h"

#include <type_traits>

#include "affine_coupling_block.h"
#include "mix_tile.h"
#include "processor.h"
#include "rational_quadratic_spline_rows.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kWork = 1 << 18;  // multiply-adds worth a thread
constexpr int kRegisters = NF_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int kNarrow = 16;  // samples of a small tile: affine_coupling_block.h goes by so many
template <typename T>
constexpr int kWide = NF_VECTOR_BYTES == 64 ? 256 / sizeof(T) : kNarrow;

// Of how many units a tile of N samples makes the sums at once.
template <typename T, int N>
constexpr int kUnits = [] {
  constexpr int vectors = N / Simd<T>::lanes, fit = (kRegisters - vectors - 1) / vectors;
  return fit < 1 ? 1 : fit > 8 ? 8 : fit;
}();

// sum[r * step] += sum_k w[r * pitch + at(k)] in[at(k)], for R units; `order` gives at(k), or is null for k itself.
template <typename T, int N, int R, bool ordered>
void add_products(const T* w, int64_t pitch, const T* in, int64_t count, const int32_t* order, T* sum, int64_t step) {
  using V = Simd<T>;
  constexpr int n = N / V::lanes;
  typename V::type acc[R][n];
  NF_UNROLL
  for (int r = 0; r < R; ++r) NF_UNROLL
  for (int i = 0; i < n; ++i) acc[r][i] = V::load(sum + r * step + i * V::lanes);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t at = ordered ? order[k] : k;
    typename V::type value[n];
    NF_UNROLL
    for (int i = 0; i < n; ++i) value[i] = V::load(in + at * N + i * V::lanes);
    NF_UNROLL
    for (int r = 0; r < R; ++r) NF_UNROLL
    for (int i = 0; i < n; ++i) acc[r][i] += w[r * pitch + at] * value[i];
  }
  NF_UNROLL
  for (int r = 0; r < R; ++r) NF_UNROLL
  for (int i = 0; i < n; ++i) V::store(sum + r * step + i * V::lanes, acc[r][i]);
}

template <typename T, int N, int R = kUnits<T, N>>
void add_products(int rows, const T* w, int64_t pitch, const T* in, int64_t count, const int32_t* order, T* sum,
                  int64_t step) {
  if (rows == R)
    return order ? add_products<T, N, R, true>(w, pitch, in, count, order, sum, step)
                 : add_products<T, N, R, false>(w, pitch, in, count, order, sum, step);
  if constexpr (R > 1) add_products<T, N, R - 1>(rows, w, pitch, in, count, order, sum, step);
}

template <typename T, Activation kind>
void activate(const T* __restrict from, T* __restrict to, int64_t n) {
  NF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) to[i] = activated<T, kind>(from[i]);
}

template <typename T>
using Activate = void (*)(const T*, T*, int64_t);

template <typename T>
Activate<T> activate_for(Activation kind) {
  static const Activate<T> table[] = {activate<T, Activation::relu>, activate<T, Activation::leaky_relu>,
                                      activate<T, Activation::elu>, activate<T, Activation::silu>,
                                      activate<T, Activation::tanh>};
  return table[static_cast<int>(kind)];
}

// What every tile reads.
template <typename T>
struct InverseJob {
  const AutoregressiveInverse& k;
  Activate<T> activate;
  BlockFunction<T> couple;
  MapConstants<T> constants;
  int64_t start[kMostLayers + 1];  // unit 0 of a hidden layer, in units
  int64_t wide, narrow;            // tiles, the wide ones first

  explicit InverseJob(const AutoregressiveInverse& inverse)
      : k(inverse),
        activate(activate_for<T>(inverse.activation)),
        couple(block_function<T, false>(inverse.affine)),
        constants(map_constants<T>(inverse.affine.constants)) {
    start[0] = 0;
    for (int i = 0; i < k.layers; ++i) start[i + 1] = start[i] + k.layer[i].width;
    const int64_t rest = k.batch % kWide<T>;
    const bool small = kWide<T> > kNarrow && 2 * rest <= kWide<T>;
    wide = k.batch / kWide<T> + (rest && !small ? 1 : 0);
    narrow = small ? (rest + kNarrow - 1) / kNarrow : 0;
  }

  static void body(void* self, int64_t begin, int64_t end);
};

// N samples: features and units by rows of N.
template <typename T, int N>
struct Tile {
  const InverseJob<T>& job;
  const AutoregressiveInverse& k;
  Buffer<T> x, units, sums, params, powers;  // sums: of hidden layers, before their activation
  alignas(64) T total[N];

  explicit Tile(const InverseJob<T>& j)
      : job(j),
        k(j.k),
        x(k.features * N),
        units(j.start[k.layers] * N),
        sums(j.start[k.layers] * N),
        params(k.per_feature * (k.spline.bins ? kSplineRow : N)),
        powers(2 * k.spline.bins * kSplineRow) {}

  const T* input(int i) const { return i == 0 ? x.data : units.data + job.start[i - 1] * N; }

  // sum += W in for rows [first, last) of a layer's weight, over the first `count` of what it sees.
  void multiply(int i, int64_t first, int64_t last, int64_t count, T* sum, int64_t step = N) const {
    const MaskedLayer& layer = k.layer[i];
    for (int64_t r = first; r < last; r += kUnits<T, N>) {
      const int rows = static_cast<int>(last - r < kUnits<T, N> ? last - r : kUnits<T, N>);
      add_products<T, N>(rows, static_cast<const T*>(layer.weight) + r * layer.inputs, layer.inputs, input(i), count,
                         i == 0 ? k.order() : nullptr, sum + (r - first) * step, step);
    }
  }

  // The units of hidden layer i that see what is known so far and were not computed before.
  void hidden(int i, int64_t step, int64_t b, int count) {
    const MaskedLayer& layer = k.layer[i];
    const int64_t first = k.unit_offsets(i)[step], last = k.unit_offsets(i)[step + 1];
    if (first == last) return;
    const auto* bias = static_cast<const T*>(layer.bias);
    T* sum = sums.data + (job.start[i] + first) * N;
    const T* earlier = layer.residual < 0 ? nullptr : sums.data + (job.start[layer.residual] + first) * N;
    for (int64_t j = 0; j < last - first; ++j) {
      T* row = sum + j * N;
      const T shift = bias ? bias[first + j] : T(0);
      if (earlier)
        for (int s = 0; s < N; ++s) row[s] = earlier[j * N + s] + shift;
      else
        for (int s = 0; s < N; ++s) row[s] = shift;
      if (layer.context.data) {
        const T* from = static_cast<const T*>(layer.context.data) + b * layer.context.b + (first + j) * layer.context.c;
        for (int s = 0; s < count; ++s) row[s] += from[s * layer.context.b];
      }
    }
    multiply(i, first, last, i == 0 ? k.feature_offsets()[step] : k.unit_offsets(i - 1)[step + 1], sum);
    T* out = units.data + (job.start[i] + first) * N;
    if (i + 1 == k.layers && !k.final_activation)
      std::memcpy(out, sum, (last - first) * N * sizeof(T));
    else
      job.activate(sum, out, (last - first) * N);
  }

  void feature(int64_t f, int64_t known) {
    const auto* bias = static_cast<const T*>(k.layer[k.layers].bias);
    const int64_t first = f * k.per_feature;
    const int64_t step = k.spline.bins ? kSplineRow : N;
    for (int64_t p = 0; p < k.per_feature; ++p)
      for (int s = 0; s < N; ++s) params.data[p * step + s] = bias ? bias[first + p] : T(0);
    multiply(k.layers, first, first + k.per_feature, known, params.data, step);
    T* row = x.data + f * N;
    alignas(64) T log[N];
    k.spline.bins ? spline_rows(k.spline, params.data, powers.data, row, log, N) : affine(row, log);
    for (int s = 0; s < N; ++s) total[s] += log[s];
  }

  void affine(T* row, T* log) {
    alignas(64) T y[N], one[N], zero[N];
    for (int s = 0; s < N; ++s) one[s] = T(1), zero[s] = T(0);
    Block<T> block{};
    block.x = row;
    block.t = params.data + k.affine.shift_offset(1) * N;
    block.r = params.data + k.affine.scale_offset(1) * N;
    block.g = one;
    block.log_g = zero;
    block.y = y;
    block.log_s = log;
    job.couple(block, N, job.constants, T(k.affine.shift_factor()));
    std::memcpy(row, y, sizeof y);
  }

  void run(int64_t b, int count) {
    const auto* z = static_cast<const T*>(k.z.data) + b * k.z.b;
    for (int64_t f = 0; f < k.features; ++f) {
      T* row = x.data + f * N;
      for (int s = 0; s < count; ++s) row[s] = z[s * k.z.b + f * k.z.c];
      for (int s = count; s < N; ++s) row[s] = T(0);
    }
    for (int s = 0; s < N; ++s) total[s] = T(0);
    for (int64_t step = 0; step < k.passes; ++step) {
      for (int i = 0; i < k.layers; ++i) hidden(i, step, b, count);
      const int64_t known = k.unit_offsets(k.layers - 1)[step + 1];
      for (int64_t j = k.feature_offsets()[step]; j < k.feature_offsets()[step + 1]; ++j) feature(k.order()[j], known);
    }
    auto* out = static_cast<T*>(k.x.data) + b * k.x.b;
    for (int64_t f = 0; f < k.features; ++f)
      for (int s = 0; s < count; ++s) out[s * k.x.b + f * k.x.c] = x.data[f * N + s];
    std::memcpy(static_cast<T*>(k.logdet) + b, total, count * sizeof(T));
  }
};

template <typename T>
void InverseJob<T>::body(void* self, int64_t begin, int64_t end) {
  const auto& job = *static_cast<InverseJob*>(self);
  const int64_t batch = job.k.batch;
  if (begin < job.wide) {
    Tile<T, kWide<T>> tile(job);
    for (int64_t i = begin; i < end && i < job.wide; ++i) {
      const int64_t b = i * kWide<T>;
      tile.run(b, static_cast<int>(batch - b < kWide<T> ? batch - b : kWide<T>));
    }
  }
  if (end > job.wide) {
    Tile<T, kNarrow> tile(job);
    for (int64_t i = begin < job.wide ? job.wide : begin; i < end; ++i) {
      const int64_t b = job.wide * kWide<T> + (i - job.wide) * kNarrow;
      tile.run(b, static_cast<int>(batch - b < kNarrow ? batch - b : kNarrow));
    }
  }
}

template <typename T>
void forward(const AutoregressiveInverse& k, const Launch& on) {
  InverseJob<T> job(k);
  int64_t work = 1;  // of a tile
  for (int i = 0; i <= k.layers; ++i) work += k.layer[i].width * k.layer[i].inputs / 2 * kWide<T>;
  const int64_t tiles = job.wide + job.narrow;
  if (tiles) on.parallel(tiles, kWork / work + 1, &job, InverseJob<T>::body);
}

}  // namespace

void autoregressive_inverse_forward(const AutoregressiveInverse& k, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, on) : forward<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
