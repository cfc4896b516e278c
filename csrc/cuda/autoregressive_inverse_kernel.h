// The inverse of a masked autoregressive layer on CUDA: a block to a tile of samples, all units of the network in
// shared memory, each computed when its degree has its turn.
//
// A warp makes the sums of up to four units at once: lane = 8 part + column, where a part takes a quarter of the terms
// and a column `V` samples. Few samples are spread one to a column, over as many blocks as there are; many go by four,
// so that a weight that was read serves four products. A rule is what a feature's params do to it.
#pragma once

#include "../include/autoregressive_inverse.h"
#include "affine_coupling_layout.h"
#include "affine_coupling_math.h"

namespace nf {
namespace cuda {
namespace {

constexpr int kMostWarps = 8;
constexpr size_t kShared = 96 * 1024;  // what every architecture gives a block
constexpr int kParts = 4, kColumns = 8;

// Samples of a tile, and elements from a unit to the next: parts read units four apart, from banks of their own.
template <int V>
constexpr int kSamples = kColumns * V;
template <int V>
constexpr int kPitch = V == 1 ? kColumns + 2 : kSamples<V>;
template <typename T>
constexpr int kMany = 16 / sizeof(T);  // samples of a column, where there are many

template <typename T>
struct InverseLayer {
  const T *weight, *bias, *context;
  int64_t context_step;  // from sample to sample
  int inputs, start;     // start: of its units among all
  int residual;
  bool packed;  // rows begin at multiples of 16 bytes
};

// A sample's params of one feature.
template <typename T, int pitch>
struct ParamColumn {
  const T* at;
  NF_DEVICE T operator[](int i) const { return at[i * pitch]; }
};

template <typename T, typename Rule>
struct InverseTask {
  const T* z;
  T *x, *logdet, *spill;                           // spill: for tiles that shared memory does not hold
  int64_t z_b, z_c, x_b, x_c, batch, tiles, kept;  // kept: elements of a tile
  int features, passes, layers, units, per_feature;
  InverseLayer<T> layer[kMostLayers + 1];
  Activation activation;
  bool final_activation;
  Rule rule;
  const int32_t* table;
};

// The sums of R units over the first `count` of what they see, in every part; rows from `rows` on repeat the last one.
template <int V, int R, typename T>
NF_DEVICE void sums_of(const InverseLayer<T>& layer, int64_t first, int rows, const T* in, int count,
                       const int32_t* order, T (&acc)[R][V]) {
  constexpr int pitch = kPitch<V>;
  const int part = lane() / kColumns;
  const T* w[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    w[r] = layer.weight + (first + (r < rows ? r : rows - 1)) * layer.inputs;
#pragma unroll
    for (int v = 0; v < V; ++v) acc[r][v] = T(0);
  }
  const auto add = [&](int at) {
    const auto value = load_pack<V>(in + at * pitch);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const T weight = w[r][at];
#pragma unroll
      for (int v = 0; v < V; ++v) acc[r][v] += weight * value[v];
    }
  };
  int k = part;
  if (layer.packed && !order) {
    for (int c = 4 * part; c + 4 <= count; c += 4 * kParts) {
      Pack<T, 4> weight[R];
#pragma unroll
      for (int r = 0; r < R; ++r) weight[r] = load_pack<4>(w[r] + c);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto value = load_pack<V>(in + (c + j) * pitch);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int v = 0; v < V; ++v) acc[r][v] += weight[r][j] * value[v];
      }
    }
    k += count & ~3;
  }
#pragma unroll 2
  for (; k < count; k += kParts) add(order ? order[k] : k);
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int v = 0; v < V; ++v) {
      acc[r][v] += shuffle_xor(acc[r][v], kColumns);
      acc[r][v] += shuffle_xor(acc[r][v], 2 * kColumns);
    }
}

template <typename T>
NF_DEVICE T activate(Activation kind, T v) {
  switch (kind) {
    case Activation::relu:
      return activated<T, Activation::relu>(v);
    case Activation::leaky_relu:
      return activated<T, Activation::leaky_relu>(v);
    case Activation::elu:
      return activated<T, Activation::elu>(v);
    case Activation::silu:
      return activated<T, Activation::silu>(v);
    default:
      return activated<T, Activation::tanh>(v);
  }
}

// Of R units [first, first + rows), part p finishes unit p: finish(unit, its sums of this lane's V samples).
template <int V, int R, typename T, typename F>
NF_DEVICE void rows_of(const InverseLayer<T>& layer, int64_t first, int rows, const T* in, int count,
                       const int32_t* order, F&& finish) {
  T acc[R][V];
  sums_of<V, R>(layer, first, rows, in, count, order, acc);
  const int part = lane() / kColumns;
  T own[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    own[v] = acc[0][v];
#pragma unroll
    for (int r = 1; r < R; ++r) own[v] = part == r ? acc[r][v] : own[v];
  }
  if (part < rows) finish(static_cast<int>(first) + part, own);
}

// Units [first, last) of a layer by warps `at`, `at + by`, ..
template <int V, typename T, typename F>
NF_DEVICE void units_of(const InverseLayer<T>& layer, int64_t first, int64_t last, int at, int by, const T* in,
                        int count, const int32_t* order, F&& finish) {
  const int share = static_cast<int>((last - first + by - 1) / by), step = share < kParts ? share : kParts;
  for (int64_t r = first + at * step; r < last; r += by * step) {
    const int rows = static_cast<int>(last - r < step ? last - r : step);
    switch (rows) {
      case 1:
        rows_of<V, 1>(layer, r, rows, in, count, order, finish);
        break;
      case 2:
        rows_of<V, 2>(layer, r, rows, in, count, order, finish);
        break;
      default:
        rows_of<V, 4>(layer, r, rows, in, count, order, finish);
    }
  }
}

// rule(v, params, log) is what becomes of a value, and log its log-derivative.
template <typename T, typename Rule, int V, bool in_shared>
__global__ __launch_bounds__(32 * kMostWarps, 2) void inverse_kernel(const InverseTask<T, Rule> k) {
  constexpr int samples = kSamples<V>, pitch = kPitch<V>;
  NF_SHARED(T, shared);
  T* x = in_shared ? shared : k.spill + blockIdx.x * k.kept;
  T* units = x + k.features * pitch;
  T* params = units + k.units * pitch;
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int at = warp(), warps = threads / 32, column = lane() % kColumns * V;
  const int32_t *feature_offsets = k.table, *order = k.table + k.passes + 1;
  T* own_params = params + at * k.per_feature * pitch;

  for (int64_t tile = blockIdx.x; tile < k.tiles; tile += gridDim.x) {
    const int64_t b = tile * samples;
    const int count = static_cast<int>(k.batch - b < samples ? k.batch - b : samples);
    for (int i = tid; i < samples * k.features; i += threads) {
      const int s = i / k.features, f = i % k.features;
      x[f * pitch + s] = s < count ? k.z[(b + s) * k.z_b + f * k.z_c] : T(0);
    }
    sync_block();
    T total = T(0);
    for (int step = 0; step < k.passes; ++step) {
      const int known_features = feature_offsets[step];
      for (int i = 0; i < k.layers; ++i) {
        const InverseLayer<T>& layer = k.layer[i];
        const int32_t* offsets = order + k.features + i * (k.passes + 1) + step;
        const int first = offsets[0], last = offsets[1];
        const bool active = i + 1 < k.layers || k.final_activation;
        // What the layer before has computed by now: its offsets lie before this one's.
        const int seen = i == 0 ? known_features : offsets[-k.passes];
        const T* in = i == 0 ? x : units + k.layer[i - 1].start * pitch;
        units_of<V>(layer, first, last, at, warps, in + column, seen, i == 0 ? order : nullptr,
                    [&](int unit, T(&sum)[V]) {
                      T* out = units + (layer.start + unit) * pitch + column;
                      const T bias = layer.bias ? layer.bias[unit] : T(0);
                      Pack<T, V> value;
#pragma unroll
                      for (int v = 0; v < V; ++v) {
                        value[v] = sum[v] + bias;
                        if (layer.context && column + v < count)
                          value[v] += layer.context[(b + column + v) * layer.context_step + unit];
                      }
                      if (layer.residual >= 0) {  // the earlier layer's sum was left here
                        const auto earlier = load_pack<V>(out);
#pragma unroll
                        for (int v = 0; v < V; ++v) value[v] += earlier[v];
                      }
                      for (int j = i + 1; j < k.layers; ++j)
                        if (k.layer[j].residual == i)
                          store_pack<V>(units + (k.layer[j].start + unit) * pitch + column, value);
                      if (active) {
#pragma unroll
                        for (int v = 0; v < V; ++v) value[v] = activate(k.activation, value[v]);
                      }
                      store_pack<V>(out, value);
                    });
        sync_block();
      }
      const InverseLayer<T>& last_layer = k.layer[k.layers];
      const int seen = order[k.features + (k.layers - 1) * (k.passes + 1) + step + 1];
      const T* in = units + k.layer[k.layers - 1].start * pitch + column;
      for (int j = known_features + at; j < feature_offsets[step + 1]; j += warps) {
        const int64_t f = order[j], first = f * k.per_feature;
        units_of<V>(last_layer, first, first + k.per_feature, 0, 1, in, seen, nullptr, [&](int row, T(&sum)[V]) {
          const T bias = last_layer.bias ? last_layer.bias[row] : T(0);
          Pack<T, V> value;
#pragma unroll
          for (int v = 0; v < V; ++v) value[v] = sum[v] + bias;
          store_pack<V>(own_params + (row - first) * pitch + column, value);
        });
        sync_warp();
        if (lane() < samples) {
          T log;
          const ParamColumn<T, pitch> own{own_params + lane()};
          x[f * pitch + lane()] = k.rule(x[f * pitch + lane()], own, log);
          total += log;
        }
        sync_warp();
      }
      sync_block();
    }
    if (lane() < samples) own_params[lane()] = total;
    sync_block();
    for (int i = tid; i < count * k.features; i += threads) {
      const int s = i / k.features, f = i % k.features;
      k.x[(b + s) * k.x_b + f * k.x_c] = x[f * pitch + s];
    }
    for (int s = tid; s < count; s += threads) {
      T sum = params[s];
      for (int w = 1; w < warps; ++w) sum += params[w * k.per_feature * pitch + s];
      k.logdet[b + s] = sum;
    }
    sync_block();
  }
}

// --- launching -------------------------------------------------------------------------------------------------------

template <int V, typename Task>
int64_t kept_by(const Task& task, int warps) {
  return (int64_t{task.features} + task.units + int64_t{warps} * task.per_feature) * kPitch<V>;
}

// Warps of a block that makes `rows` units a pass: a warp for four of them, or where blocks are few for each.
int warps_for(int64_t rows, bool few) {
  const int64_t wanted = few ? rows : divide_up(rows, kParts);
  return static_cast<int>(wanted < 1 ? 1 : wanted > kMostWarps ? kMostWarps : wanted);
}

template <typename T, int V, typename Rule>
void run(InverseTask<T, Rule> task, int64_t rows, const Launch& on) {
  task.tiles = divide_up(task.batch, kSamples<V>);
  const int warps = warps_for(rows, task.tiles <= 4 * int64_t{on.multiprocessors});
  task.kept = kept_by<V>(task, warps);
  const int64_t bytes = task.kept * sizeof(T), most = 32 * int64_t{on.multiprocessors};
  if (bytes <= static_cast<int64_t>(kShared)) {
    launch(inverse_kernel<T, Rule, V, true>, on, task.tiles, 32 * warps, bytes, task);
    return;
  }
  const int64_t blocks = task.tiles < most ? task.tiles : most;
  task.kept = divide_up(task.kept, 4) * 4;
  task.spill = static_cast<T*>(on.scratch(blocks * task.kept * sizeof(T)));
  launch(inverse_kernel<T, Rule, V, false>, on, blocks, 32 * warps, 0, task);
}

template <typename T, typename Rule>
void run_inverse(const AutoregressiveInverse& k, const Rule& rule, const Launch& on) {
  InverseTask<T, Rule> task{static_cast<const T*>(k.z.data),
                            static_cast<T*>(k.x.data),
                            static_cast<T*>(k.logdet),
                            nullptr,
                            k.z.b,
                            k.z.c,
                            k.x.b,
                            k.x.c,
                            k.batch,
                            0,
                            0,
                            static_cast<int>(k.features),
                            static_cast<int>(k.passes),
                            k.layers,
                            0,
                            static_cast<int>(k.per_feature),
                            {},
                            k.activation,
                            k.final_activation,
                            rule,
                            k.table};
  int64_t widest = k.features * k.per_feature / kParts;
  for (int i = 0; i <= k.layers; ++i) {
    const MaskedLayer& from = k.layer[i];
    InverseLayer<T>& to = task.layer[i];
    to.weight = static_cast<const T*>(from.weight);
    to.bias = static_cast<const T*>(from.bias);
    to.context = static_cast<const T*>(from.context.data);
    to.context_step = from.context.b;
    to.inputs = static_cast<int>(from.inputs);
    to.start = task.units;
    to.residual = from.residual;
    to.packed = reinterpret_cast<uintptr_t>(from.weight) % 16 == 0 && from.inputs * sizeof(T) % 16 == 0;
    if (i == k.layers) break;
    task.units += static_cast<int>(from.width);
    if (from.width > widest) widest = from.width;
  }
  const int64_t rows = k.passes > 0 ? divide_up(widest, k.passes) : 1;
  constexpr int many = kMany<T>;
  const bool crowded = k.batch > 8 * kSamples<many> * int64_t{on.multiprocessors} &&
                       kept_by<many>(task, kMostWarps) * int64_t{sizeof(T)} <= int64_t{kShared} / 2;
  crowded ? run<T, many>(task, rows, on) : run<T, 1>(task, rows, on);
}

}  // namespace
}  // namespace cuda
}  // namespace nf
