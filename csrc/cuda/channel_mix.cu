// y = W x + b at every position for few channels, whole columns in a thread's registers: dx, dW and dbias (and the
// input rebuilt from the output) come from one pass over x and dy. Bound by memory up to kFewChannels. More channels
// and double go to the other channel_mix_*.cu.

#include "channel_mix_parts.h"

namespace nf {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// Columns that a thread owns: side by side, so that 16 bytes of a row are one access. Two tiles of 24 rows of four to a
// thread would not fit everywhere; there the backward's threads own two.
constexpr int kOwn = 4;
template <int CP>
constexpr int kOwnBackward = CP > 16 ? 2 : 4;
// 4 modulo 32: rows of the same columns, four apart, are half the banks apart when channels-last data is turned.
NF_FN constexpr int pitch_of(int own) { return kThreads * own + 4; }

// matrix[CP][CP] = weight or its transpose, zero outside.
template <int CP>
NF_DEVICE void load_matrix(const float* weight, int channels, bool transposed, float* matrix) {
  for (int i = static_cast<int>(threadIdx.x); i < CP * CP; i += kThreads) {
    const int o = i / CP, c = i % CP;
    float w = 0.0f;
    if (o < channels && c < channels) w = transposed ? weight[c * channels + o] : weight[o * channels + c];
    matrix[i] = w;
  }
}

template <int CP>
NF_DEVICE void load_vector(const float* values, int channels, float* vector) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < CP) vector[i] = values && i < channels ? values[i] : 0.0f;
}

// matrix[o, :] . x + start for a thread's columns.
template <int CP, int V>
NF_DEVICE Pack<float, V> multiply_row(const float* matrix, int o, const Pack<float, V> (&x)[CP], float start) {
  Pack<float, V> y;
#pragma unroll
  for (int v = 0; v < V; ++v) y[v] = start;
#pragma unroll
  for (int c = 0; c < CP; c += 4) {
    const Pack<float, 4> w = load_pack<4>(matrix + o * CP + c);
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int v = 0; v < V; ++v) y[v] += w[e] * x[c + e][v];
  }
  return y;
}

template <DType d, int CP>
__global__ __launch_bounds__(kThreads) void few_forward(MixForwardTask<float> k) {
  using S = StorageType<d>;
  constexpr int V = kOwn, N = kThreads * V, pitch = pitch_of(V);
  NF_SHARED(float, matrix);
  float* bias = matrix + CP * CP;
  float* tile = bias + CP;
  const int channels = static_cast<int>(k.channels);
  load_matrix<CP>(k.weight, channels, false, matrix);
  load_vector<CP>(k.bias, channels, bias);
  sync_block();
  // Wide rows need no shared memory: a thread's columns go straight into its registers.
  const bool direct = k.x.way == Way::positions_wide && k.y.way == Way::positions_wide;
  const int j = static_cast<int>(threadIdx.x) * V;
  for (int64_t first = blockIdx.x * int64_t{N}; first < k.count; first += gridDim.x * int64_t{N}) {
    const TilePlace at = tile_place(first, k.count, k.positions);
    Pack<float, V> x[CP];
    if (direct) {
      if (j >= at.left) continue;
      const S* from = static_cast<const S*>(k.x.data) + column_offset(k.x, at, j);
      Pack<S, V> raw[CP];
#pragma unroll
      for (int c = 0; c < CP; ++c) raw[c] = load_pack<V>(from + (c < channels ? c : 0) * k.x.c);
#pragma unroll
      for (int c = 0; c < CP; ++c)
#pragma unroll
        for (int v = 0; v < V; ++v) x[c][v] = c < channels ? Storage<d>::load(raw[c][v]) : 0.0f;
      S* to = static_cast<S*>(k.y.data) + column_offset(k.y, at, j);
#pragma unroll 2
      for (int o = 0; o < channels; ++o) {
        const Pack<float, V> y = multiply_row<CP, V>(matrix, o, x, bias[o]);
        Pack<S, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] = Storage<d>::store(y[v]);
        store_pack<V>(to + o * k.y.c, out);
      }
    } else {
      load_tile<d, N>(k.x, at, channels, 0, CP, tile, pitch);
      copy_commit();
      copy_wait<0>();
      sync_block();
#pragma unroll
      for (int c = 0; c < CP; ++c) x[c] = load_pack<V>(tile + c * pitch + j);
#pragma unroll 2
      for (int o = 0; o < channels; ++o)
        store_pack<V>(tile + o * pitch + j, multiply_row<CP, V>(matrix, o, x, bias[o]));
      sync_block();
      store_tile<d, N>(k.y, at, channels, 0, channels, tile, pitch);
      sync_block();
    }
  }
}

// dW in blocks of 4 x 4, each made by several threads that take every kSlices-th group of columns.
template <int CP>
constexpr int kBlocks = CP / 4;
template <int CP>
constexpr int kSlices = kThreads / (kBlocks<CP> * kBlocks<CP>);

template <DType d, int CP>
__global__ __launch_bounds__(kThreads, 2) void few_backward(MixBackwardTask<float> k) {
  constexpr int V = kOwnBackward<CP>, N = kThreads * V, pitch = pitch_of(V), B = kBlocks<CP>, slices = kSlices<CP>;
  NF_SHARED(float, matrix);
  float* inverse = matrix + CP * CP;
  float* bias = inverse + CP * CP;
  float* dy = bias + CP;
  float* x = dy + CP * pitch;
  const int channels = static_cast<int>(k.channels), tid = static_cast<int>(threadIdx.x);
  if (k.weight) load_matrix<CP>(k.weight, channels, true, matrix);
  if (k.inverse) load_matrix<CP>(k.inverse, channels, false, inverse);
  load_vector<CP>(k.bias, channels, bias);
  const bool need_x = k.need_dweight || k.inverse, need_dy = k.need_dweight || k.need_dbias || k.weight;
  const int block = tid / slices, slice = tid % slices, j = tid * V;
  const int rows = block / B * 4, cols = block % B * 4;  // of dW
  const bool sums = block < B * B && (k.need_dweight || (k.need_dbias && cols == 0));
  float dweight[4][4] = {}, dbias[4] = {};
  for (int64_t first = blockIdx.x * int64_t{N}; first < k.count; first += gridDim.x * int64_t{N}) {
    const TilePlace at = tile_place(first, k.count, k.positions);
    if (need_dy) load_tile<d, N>(k.dy, at, channels, 0, CP, dy, pitch);
    if (need_x) load_tile<d, N>(k.x, at, channels, 0, CP, x, pitch);
    copy_commit();
    copy_wait<0>();
    sync_block();
    if (k.inverse) {
      Pack<float, V> y[CP];
#pragma unroll
      for (int c = 0; c < CP; ++c) {
        y[c] = load_pack<V>(x + c * pitch + j);
#pragma unroll
        for (int v = 0; v < V; ++v) y[c][v] -= bias[c];
      }
#pragma unroll 2
      for (int o = 0; o < channels; ++o) store_pack<V>(x + o * pitch + j, multiply_row<CP, V>(inverse, o, y, 0.0f));
      sync_block();
      store_tile<d, N>(k.rebuilt, at, channels, 0, channels, x, pitch);
    }
    if (sums) {
#pragma unroll 1
      for (int n = slice * 4; n < N; n += slices * 4) {
        Pack<float, 4> a[4], b[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] = load_pack<4>(dy + (rows + e) * pitch + n);
        if (k.need_dweight) {
#pragma unroll
          for (int f = 0; f < 4; ++f) b[f] = load_pack<4>(x + (cols + f) * pitch + n);
#pragma unroll
          for (int v = 0; v < 4; ++v)
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
              for (int f = 0; f < 4; ++f) dweight[e][f] += a[e][v] * b[f][v];
        }
        if (cols == 0) {
#pragma unroll
          for (int e = 0; e < 4; ++e) dbias[e] += (a[e][0] + a[e][1]) + (a[e][2] + a[e][3]);
        }
      }
    }
    sync_block();
    if (k.weight) {
      Pack<float, V> grad[CP];
#pragma unroll
      for (int c = 0; c < CP; ++c) grad[c] = load_pack<V>(dy + c * pitch + j);
#pragma unroll 2
      for (int o = 0; o < channels; ++o) store_pack<V>(dy + o * pitch + j, multiply_row<CP, V>(matrix, o, grad, 0.0f));
      sync_block();
      store_tile<d, N>(k.dx, at, channels, 0, channels, dy, pitch);
      sync_block();
    }
  }
  if (!k.partial) return;
  // Slices are added in order.
  float* all = dy;                           // [slices][CP][CP]
  float* all_bias = all + slices * CP * CP;  // [slices][CP]
  sync_block();
  if (sums) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int f = 0; f < 4; ++f) all[(slice * CP + rows + e) * CP + cols + f] = dweight[e][f];
      if (cols == 0) all_bias[slice * CP + rows + e] = dbias[e];
    }
  }
  sync_block();
  float* partial = k.partial + blockIdx.x * (k.channels + 1) * k.channels;
  if (k.need_dweight)
    for (int i = tid; i < channels * channels; i += kThreads) {
      float sum = 0.0f;
#pragma unroll 4
      for (int s = 0; s < slices; ++s) sum += all[(s * CP + i / channels) * CP + i % channels];
      partial[i] = sum;
    }
  if (k.need_dbias)
    for (int i = tid; i < channels; i += kThreads) {
      float sum = 0.0f;
#pragma unroll 1
      for (int s = 0; s < slices; ++s) sum += all_bias[s * CP + i];
      partial[channels * channels + i] = sum;
    }
}

template <DType d, int CP>
void forward_few(const MixForward& k, const Launch& on) {
  const MixForwardTask<float> task = forward_task<float>(k);
  const bool direct = task.x.way == Way::positions_wide && task.y.way == Way::positions_wide;
  const size_t shared = (CP * CP + CP + (direct ? 0 : CP * pitch_of(kOwn))) * sizeof(float);
  const int64_t blocks = at_most(ceil_div(task.count, kThreads * kOwn), on.multiprocessors * int64_t{8});
  launch(few_forward<d, CP>, on, blocks, kThreads, shared, task);
}

template <DType d, int CP>
void backward_few(const MixBackward& k, const Launch& on) {
  MixBackwardTask<float> task = backward_task<float>(k);
  static_assert(2 * CP * pitch_of(kOwnBackward<CP>) >= kSlices<CP> * (CP + 1) * CP,
                "the slices' sums take the tiles' place");
  const size_t shared = (2 * CP * CP + CP + 2 * CP * pitch_of(kOwnBackward<CP>)) * sizeof(float);
  const int64_t blocks =
      at_most(ceil_div(task.count, kThreads * kOwnBackward<CP>), kMultiprocessors * int64_t{CP <= 4   ? 5
                                                                                            : CP <= 8 ? 4
                                                                                                      : 3});
  make_partials(task, blocks, on);
  launch(few_backward<d, CP>, on, blocks, kThreads, shared, task);
  finish_partials(k, task, blocks, on);
}

template <DType d>
void forward_padded(const MixForward& k, const Launch& on) {
  k.channels <= 4    ? forward_few<d, 4>(k, on)
  : k.channels <= 8  ? forward_few<d, 8>(k, on)
  : k.channels <= 12 ? forward_few<d, 12>(k, on)
  : k.channels <= 16 ? forward_few<d, 16>(k, on)
                     : forward_few<d, 24>(k, on);
}

template <DType d>
void backward_padded(const MixBackward& k, const Launch& on) {
  k.channels <= 4    ? backward_few<d, 4>(k, on)
  : k.channels <= 8  ? backward_few<d, 8>(k, on)
  : k.channels <= 12 ? backward_few<d, 12>(k, on)
  : k.channels <= 16 ? backward_few<d, 16>(k, on)
                     : backward_few<d, 24>(k, on);
}

}  // namespace

void channel_mix_forward(const MixForward& k, const Launch& on) {
  if (k.channels == 0 || k.batch * k.positions == 0) return;
  if (k.data == DType::f64) return mix_forward_double(k, on);
  if (k.channels > kFewChannels) return mix_forward_tensor(k, on);
  k.data == DType::f32    ? forward_padded<DType::f32>(k, on)
  : k.data == DType::bf16 ? forward_padded<DType::bf16>(k, on)
                          : forward_padded<DType::f16>(k, on);
}

void channel_mix_backward(const MixBackward& k, const Launch& on) {
  if (k.channels == 0) return;
  if (k.data == DType::f64) return mix_backward_double(k, on);
  if (k.channels > kFewChannels) return mix_backward_tensor(k, on);
  k.data == DType::f32    ? backward_padded<DType::f32>(k, on)
  : k.data == DType::bf16 ? backward_padded<DType::bf16>(k, on)
                          : backward_padded<DType::f16>(k, on);
}

}  // namespace cuda
}  // namespace nf
