// The channel mix on tensor cores (mix_tensor.h), for more channels than a thread's registers hold.
//
// Up to kFusedChannels a block keeps the matrix in shared memory, and one pass over x and dy makes dx, dW, dbias and
// the rebuilt input. Above, the products are tiled over output channels and over k (each reads its operand ceil(C / 64)
// times, out of the second-level cache as far as it holds them), and dW is made by itself in blocks of 64 x 64.

#include "channel_mix_parts.h"
#include "mix_tensor.h"

namespace nf {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// How eight warps share MC x N results of a product: M x N8 fragments each.
template <int MC, int N>
struct Product {
  static constexpr int down = MC >= 64 ? 2 : 1, across = kWarps / down;  // warps
  static constexpr int M = MC / 16 / down, N8 = N / 8 / across, k_tiles = MC / 8, pitch = tile_pitch(N);
  static_assert(M * down * 16 == MC && N8 * across * 8 == N);

  static NF_DEVICE int first_row() { return warp() / across * M * 16; }
  static NF_DEVICE int first_column() { return warp() % across * N8 * 8; }

  template <bool shifted, int unrolled>
  static NF_DEVICE void run(const float* fragments, const float* tile, const float* shift, float (&acc)[M][N8][4]) {
    multiply_tile<shifted, unrolled>(fragments + first_row() * k_tiles * 8, k_tiles, tile + first_column(), pitch,
                                     shift, acc);
  }
  static NF_DEVICE void write(const float (&acc)[M][N8][4], float* tile, const float* bias) {
    write_fragments(acc, tile + first_row() * pitch + first_column(), pitch, bias ? bias + first_row() : nullptr);
  }
};

// How eight warps share the MC x MC results of dW: M x N8 fragments each, `slices` warps to the same ones, each over
// its share of the columns.
template <int MC, int N>
struct Outer {
  static constexpr int M = MC == 48 ? 3 : 2, N8 = MC == 48 ? 3 : 4;
  static constexpr int across = MC / 8 / N8, parts = MC / 16 / M * across, slices = kWarps / parts;
  static constexpr int k_tiles = N / 8 / slices;
  static_assert(parts * slices == kWarps && k_tiles * slices * 8 == N);

  static NF_DEVICE int first_row() { return warp() / slices / across * M * 16; }
  static NF_DEVICE int first_column() { return warp() / slices % across * N8 * 8; }
  static NF_DEVICE int slice() { return warp() % slices; }
};

template <int MC>
constexpr int kBackwardTile = MC == 32 ? 128 : 64;
constexpr int kForwardTile = 128;

template <int MC>
NF_DEVICE void load_fragments(const float* weight, int64_t channels, bool transposed, float* to) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < MC * MC; i += kThreads)
    to[i] = fragment_element(weight, channels, transposed, 0, 0, MC / 8, i);
}

NF_DEVICE void load_padded(const float* values, int64_t channels, int n, float* to) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) to[i] = values && i < channels ? values[i] : 0.0f;
}

template <DType d, int MC>
__global__ __launch_bounds__(kThreads, MC == 32 ? 3 : 2) void fused_forward(MixForwardTask<float> k) {
  constexpr int N = kForwardTile;
  using P = Product<MC, N>;
  NF_SHARED(float, fragments);
  float* bias = fragments + MC * MC;
  float* tiles = bias + MC;  // two of [MC][pitch]
  load_fragments<MC>(k.weight, k.channels, false, fragments);
  load_padded(k.bias, k.channels, MC, bias);
  const int64_t start = blockIdx.x * int64_t{N}, step = gridDim.x * int64_t{N};
  int stage = 0;
  for (int64_t first = start - step; first < k.count; first += step, stage ^= 1) {
    float* tile = tiles + stage * (MC * P::pitch);
    copy_wait<0>();
    sync_block();  // the tile has come, and the other one has been written out
    if (first + step < k.count)
      load_tile<d, N>(k.x, tile_place(first + step, k.count, k.positions), k.channels, 0, MC,
                      tiles + (stage ^ 1) * (MC * P::pitch), P::pitch);
    copy_commit();
    if (first < start) continue;  // the first turn only loads
    float acc[P::M][P::N8][4] = {};
    P::template run<false, 2>(fragments, tile, nullptr, acc);
    sync_block();
    P::write(acc, tile, bias);
    sync_block();
    store_tile<d, N>(k.y, tile_place(first, k.count, k.positions), k.channels, 0, MC, tile, P::pitch);
  }
}

// Above kFusedChannels a block makes 64 x 64 of dW, from dy's and x's channels at its own place; then there is neither
// weight nor inverse. Blocks that share a place take turns at the columns' tiles.
template <DType d, int MC>
__global__ __launch_bounds__(kThreads, 2) void fused_backward(MixBackwardTask<float> k, int places, int stages) {
  constexpr int N = kBackwardTile<MC>;
  using P = Product<MC, N>;
  using O = Outer<MC, N>;
  constexpr int size = MC * P::pitch;
  NF_SHARED(float, bias);
  float* tiles = bias + MC;  // [stages][dy, x]
  float* fragments = tiles + stages * 2 * size;
  float* inverse = fragments + (k.weight ? MC * MC : 0);
  load_padded(k.bias, k.channels, MC, bias);
  if (k.weight) load_fragments<MC>(k.weight, k.channels, true, fragments);
  if (k.inverse) load_fragments<MC>(k.inverse, k.channels, false, inverse);
  const int place = static_cast<int>(blockIdx.x) % (places * places),
            turn = static_cast<int>(blockIdx.x) / (places * places);
  const int64_t dy_first = place / places * MC, x_first = place % places * MC;
  const bool need_x = k.need_dweight || k.inverse;
  const bool need_dbias = k.need_dbias && x_first == 0, need_dy = k.need_dweight || need_dbias || k.weight;
  const int tid = static_cast<int>(threadIdx.x);
  float sums[O::M][O::N8][4] = {}, sum = 0.0f;
  const int64_t start = turn * int64_t{N}, step = gridDim.x / (places * places) * int64_t{N};
  const int ahead = stages - 1;  // tiles that are loaded before they are needed
  int stage = 0;
  for (int64_t first = start - ahead * step; first < k.count; first += step, stage ^= ahead) {
    float* dy = tiles + stage * 2 * size;
    float* x = dy + size;
    if (ahead) copy_wait<0>();
    sync_block();  // the tiles have come, and the others have been written out
    const int64_t next = first + ahead * step;
    if (next < k.count) {
      const TilePlace at = tile_place(next, k.count, k.positions);
      float* tile = tiles + (stage ^ ahead) * 2 * size;
      if (need_dy) load_tile<d, N>(k.dy, at, k.channels, dy_first, MC, tile, P::pitch);
      if (need_x) load_tile<d, N>(k.x, at, k.channels, x_first, MC, tile + size, P::pitch);
    }
    copy_commit();
    if (first < start) continue;  // the first turn only loads
    if (!ahead) {
      copy_wait<0>();
      sync_block();
    }
    if (k.inverse) {
      float acc[P::M][P::N8][4] = {};
      P::template run<true, 2>(inverse, x, bias, acc);
      sync_block();
      P::write(acc, x, nullptr);
      sync_block();
      store_tile<d, N>(k.rebuilt, tile_place(first, k.count, k.positions), k.channels, 0, MC, x, P::pitch);
    }
    if (k.need_dweight) {
      const int column = O::slice() * O::k_tiles * 8;
      multiply_rows(dy + O::first_row() * P::pitch + column, x + O::first_column() * P::pitch + column, P::pitch,
                    O::k_tiles, sums);
    }
    if (need_dbias && tid < MC * 4) {
      const float* row = dy + tid / 4 * P::pitch + tid % 4 * 4;
#pragma unroll
      for (int n = 0; n < N; n += 16) {
        const Pack<float, 4> v = load_pack<4>(row + n);
        sum += (v[0] + v[1]) + (v[2] + v[3]);
      }
    }
    if (k.weight) {
      float acc[P::M][P::N8][4] = {};
      P::template run<false, 2>(fragments, dy, nullptr, acc);
      sync_block();
      P::write(acc, dy, nullptr);
      sync_block();
      store_tile<d, N>(k.dx, tile_place(first, k.count, k.positions), k.channels, 0, MC, dy, P::pitch);
    }
  }
  if (!k.partial) return;
  float* all = tiles;  // [slices][MC][MC]
  float* partial = k.partial + turn * (k.channels + 1) * k.channels;
  copy_wait<0>();
  sync_block();
  if (k.need_dweight)
    write_fragments(sums, all + O::slice() * (MC * (MC + 8)) + O::first_row() * (MC + 8) + O::first_column(), MC + 8,
                    nullptr);
  sync_block();
  if (k.need_dweight)
    for (int i = tid; i < MC * MC; i += kThreads) {
      const int64_t o = dy_first + i / MC, c = x_first + i % MC;
      float total = 0.0f;
#pragma unroll
      for (int s = 0; s < O::slices; ++s) total += all[(s * MC + i / MC) * (MC + 8) + i % MC];
      if (o < k.channels && c < k.channels) partial[o * k.channels + c] = total;
    }
  if (need_dbias) {
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int64_t o = dy_first + tid / 4;
    if (tid < MC * 4 && tid % 4 == 0 && o < k.channels) partial[k.channels * k.channels + o] = sum;
  }
}

// --- more channels than one pass can hold ----------------------------------------------------------------------------

constexpr int kRows = 64, kDepth = 32;  // of the matrix, to a step

// All fragments of the matrix or its transpose, in the order in which wide_product's steps take them.
__global__ __launch_bounds__(kThreads) void arrange(const float* weight, int64_t channels, int transposed, int steps,
                                                    int64_t n, float* to) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= n) return;
  const int64_t step = i / (kRows * kDepth);
  to[i] = fragment_element(weight, channels, transposed, step / steps * kRows, step % steps * kDepth, kDepth / 8,
                           static_cast<int>(i % (kRows * kDepth)));
}

template <DType d, bool shifted>
__global__ __launch_bounds__(kThreads, 2) void wide_product(MixForwardTask<float> k, const float* shift, int bands,
                                                            int steps) {
  constexpr int N = kForwardTile, matrix_size = kRows * kDepth;
  using P = Product<kRows, N>;
  constexpr int size = kRows * P::pitch;
  NF_SHARED(float, shared);  // two of: fragments, tile [kDepth][pitch]; the result [kRows][pitch] takes their place
  constexpr int stage_size = matrix_size + kDepth * P::pitch;
  static_assert(2 * stage_size >= size, "the result takes the stages' place");
  const int band = static_cast<int>(blockIdx.x) % bands;
  const TilePlace at = tile_place(blockIdx.x / bands * int64_t{N}, k.count, k.positions);
  const int64_t row = int64_t{band} * kRows;
  float* shifts = shared + 2 * stage_size;  // two of [kDepth]
  const int tid = static_cast<int>(threadIdx.x);
  float sums[P::M][P::N8][4] = {};
  for (int step = -1; step < steps; ++step) {
    const int stage = step & 1;
    copy_wait<0>();
    sync_block();
    if (step + 1 < steps) {
      float* to = shared + (stage ^ 1) * stage_size;
      const float* from = k.weight + (int64_t{band} * steps + step + 1) * matrix_size;
      for (int i = tid * 4; i < matrix_size; i += kThreads * 4) copy_async<16>(to + i, from + i);
      const int64_t channel = int64_t{step + 1} * kDepth;
      load_tile<d, N>(k.x, at, k.channels, channel, kDepth, to + matrix_size, P::pitch);
      if (shifted && tid < kDepth)
        shifts[(stage ^ 1) * kDepth + tid] = shift && channel + tid < k.channels ? shift[channel + tid] : 0.0f;
    }
    copy_commit();
    if (step < 0) continue;
    const float* fragments = shared + stage * stage_size;
    float acc[P::M][P::N8][4] = {};
    multiply_tile<shifted, 1>(fragments + P::first_row() * kDepth, kDepth / 8,
                              fragments + matrix_size + P::first_column(), P::pitch, shifts + stage * kDepth, acc);
#pragma unroll
    for (int i = 0; i < P::M; ++i)
#pragma unroll
      for (int j = 0; j < P::N8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] += acc[i][j][e];
  }
  copy_wait<0>();
  sync_block();
  P::write(sums, shared, nullptr);
  sync_block();
  if (k.bias)
    for (int i = tid; i < kRows * N; i += kThreads)
      if (row + i / N < k.channels) shared[i / N * P::pitch + i % N] += k.bias[row + i / N];
  sync_block();
  store_tile<d, N>(k.y, at, k.channels, row, kRows, shared, P::pitch);
}

// --- launches --------------------------------------------------------------------------------------------------------

template <DType d>
void product_wide(MixForwardTask<float> task, bool transposed, bool shifted, const float* shift, const Launch& on) {
  const int bands = static_cast<int>(ceil_div(task.channels, kRows)),
            steps = static_cast<int>(ceil_div(task.channels, kDepth));
  const int64_t n = int64_t{bands} * steps * kRows * kDepth;
  auto* fragments = static_cast<float*>(on.scratch(n * sizeof(float)));
  launch(arrange, on, ceil_div(n, kThreads), kThreads, 0, task.weight, task.channels, transposed, steps, n, fragments);
  task.weight = fragments;
  const size_t bytes = 2 * (kRows * kDepth + kDepth * tile_pitch(kForwardTile) + kDepth) * sizeof(float);
  launch(shifted ? wide_product<d, true> : wide_product<d, false>, on, ceil_div(task.count, kForwardTile) * bands,
         kThreads, bytes, task, shift, bands, steps);
}

template <DType d, int MC>
void forward_fused(const MixForward& k, const Launch& on) {
  const MixForwardTask<float> task = forward_task<float>(k);
  const int64_t blocks = at_most(ceil_div(task.count, kForwardTile), on.multiprocessors * int64_t{MC == 32 ? 3 : 2});
  const size_t bytes = (MC * MC + MC + 2 * MC * tile_pitch(kForwardTile)) * sizeof(float);
  launch(fused_forward<d, MC>, on, blocks, kThreads, bytes, task);
}

// With dW in `places` x `places` blocks.
template <DType d, int MC>
void backward_fused(const MixBackward& k, MixBackwardTask<float> task, int places, const Launch& on) {
  const int64_t tiles = ceil_div(task.count, kBackwardTile<MC>);
  const int64_t matrices = (task.weight ? 1 : 0) + (task.inverse ? 1 : 0);
  const auto bytes = [&](int stages) {
    return (MC + matrices * MC * MC + stages * 2 * MC * tile_pitch(kBackwardTile<MC>)) *
           static_cast<int64_t>(sizeof(float));
  };
  using O = Outer<MC, kBackwardTile<MC>>;
  static_assert(4 * MC * tile_pitch(kBackwardTile<MC>) >= O::slices * MC * (MC + 8), "dW's sums take the tiles' place");
  const int stages = bytes(2) <= kSharedEverywhere ? 2 : 1;
  const int64_t turns = at_most(tiles, at_least(kMultiprocessors * 2 / (places * places), 1));
  make_partials(task, turns, on);
  launch(fused_backward<d, MC>, on, turns * places * places, kThreads, bytes(stages), task, places, stages);
  finish_partials(k, task, turns, on);
}

template <DType d>
void forward_any(const MixForward& k, const Launch& on) {
  k.channels <= 32               ? forward_fused<d, 32>(k, on)
  : k.channels <= 48             ? forward_fused<d, 48>(k, on)
  : k.channels <= kFusedChannels ? forward_fused<d, 64>(k, on)
                                 : product_wide<d>(forward_task<float>(k), false, false, nullptr, on);
}

template <DType d>
void backward_any(const MixBackward& k, const Launch& on) {
  MixBackwardTask<float> task = backward_task<float>(k);
  if (k.channels <= 32) return backward_fused<d, 32>(k, task, 1, on);
  if (k.channels <= 48) return backward_fused<d, 48>(k, task, 1, on);
  if (k.channels <= kFusedChannels) return backward_fused<d, 64>(k, task, 1, on);
  const auto product = [&](const TileView& from, const TileView& to, const float* matrix) {
    return MixForwardTask<float>{from, to, task.channels, task.count, task.positions, matrix, nullptr};
  };
  if (task.weight) product_wide<d>(product(task.dy, task.dx, task.weight), true, false, nullptr, on);
  if (task.inverse) {
    product_wide<d>(product(task.x, task.rebuilt, task.inverse), false, true, task.bias, on);
    task.x = task.rebuilt;
  }
  task.weight = task.inverse = task.bias = nullptr;
  if (task.need_dweight || task.need_dbias)
    backward_fused<d, 64>(k, task, static_cast<int>(ceil_div(k.channels, 64)), on);
}

}  // namespace

void mix_forward_tensor(const MixForward& k, const Launch& on) {
  k.data == DType::f32    ? forward_any<DType::f32>(k, on)
  : k.data == DType::bf16 ? forward_any<DType::bf16>(k, on)
                          : forward_any<DType::f16>(k, on);
}

void mix_backward_tensor(const MixBackward& k, const Launch& on) {
  k.data == DType::f32    ? backward_any<DType::f32>(k, on)
  : k.data == DType::bf16 ? backward_any<DType::bf16>(k, on)
                          : backward_any<DType::f16>(k, on);
}

}  // namespace cuda
}  // namespace nf
