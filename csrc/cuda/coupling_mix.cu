// z = W coupling(x) + bias and its log-determinant, one pass over x and params. The backward: coupling_mix_backward.cu.
//
// Tensor cores (3xTF32) multiply from 32 channels on, plain FMA below and for double.

#include "coupling_mix_tile.h"

namespace nf {
namespace cuda {
namespace {

template <typename T>
struct MixForwardJob {
  TiledCoupling<T> k;
  Moves<2> loads;   // x and params
  Moves<2> stores;  // z, extra
  const T *weight = nullptr, *bias = nullptr;
  T* partial = nullptr;
  int extra_start = 0, extra_count = 0;
  int64_t tiles = 0, tiles_per_block = 0;

  MixForwardJob(const Coupling& coupling, const Columns& columns) : k(coupling, columns) {}
};

// What registers are to leave room for on a multiprocessor.
template <Product how>
constexpr int kBlocksAtOnce = how == Product::fma      ? 6
                              : how == Product::tensor ? 4
                                                       : 2;

// Shared memory: x, later y, [rows][pitch]; z [rows][pitch]; params; the matrix; bias [64]; log sums.
template <int N, Product how, typename T>
size_t forward_shared(const TiledCoupling<T>& k) {
  return ((2 * padded_rows<how>(k.channels) + k.params_rows) * kPitch<N, how> + matrix_size<how>(k.channels) + 64 +
          kWide<T> * kMixThreads) *
         sizeof(T);
}

// Low-precision z in its own precision, so that the extra output repeats what z says.
template <int N>
NF_DEVICE void round_rows(DType type, float* rows, int count, int pitch) {
  for (int i = static_cast<int>(threadIdx.x); i < count * N; i += kMixThreads) {
    float& v = rows[i / N * pitch + i % N];
    v = type == DType::bf16 ? Storage<DType::bf16>::load(Storage<DType::bf16>::store(v))
                            : Storage<DType::f16>::load(Storage<DType::f16>::store(v));
  }
}

template <int N, Product how, typename T>
__global__ __launch_bounds__(kMixThreads, kBlocksAtOnce<how>) void mix_forward(MixForwardJob<T> job) {
  constexpr int pitch = kPitch<N, how>;
  const TiledCoupling<T>& k = job.k;
  const int rows = padded_rows<how>(k.channels), tid = static_cast<int>(threadIdx.x);
  NF_SHARED(T, x);
  T *z = x + rows * pitch, *params = z + rows * pitch, *matrix_at = params + k.params_rows * pitch;
  T *bias = matrix_at + matrix_size<how>(k.channels), *log_sums = bias + 64;
  const Matrix<how, T> matrix = load_matrix<how>(job.weight, k.channels, false, matrix_at);
  if (tid < 64) bias[tid] = job.bias && tid < k.channels ? job.bias[tid] : T(0);
  const int64_t begin = blockIdx.x * job.tiles_per_block;
  const int64_t end = begin + job.tiles_per_block < job.tiles ? begin + job.tiles_per_block : job.tiles;
  // While a tile's z is written, the next tile is on its way.
  TilePlace at = {}, before;
#pragma unroll 1
  for (int64_t i = begin; i <= end; ++i) {
    before = at;
    if (i < end) {
      at = tile_place(i * N, k.columns, k.positions);
#pragma unroll 1
      for (int m = 0; m < job.loads.count; ++m) load_move<N, pitch>(job.loads.list[m], at, x);
      copy_commit();
    }
    if (i > begin) {
      if constexpr (sizeof(T) == 4)
        if (job.extra_count > 0 && k.data != DType::f32) {
          round_rows<N>(k.data, z + job.extra_start * pitch, job.extra_count, pitch);
          sync_block();
        }
#pragma unroll 1
      for (int m = 0; m < job.stores.count; ++m) store_move<N, pitch>(job.stores.list[m], before, x);
    }
    if (i == end) break;
    copy_wait<0>();
    sync_block();
    couple<N>(k, x, params, pitch, log_sums);
    sync_block();
    write_log_sums<N>(k, i, log_sums, job.partial);
    multiply<N, false>(matrix, x, static_cast<const T*>(nullptr), bias, z, pitch);
    sync_block();
  }
}

template <int N, Product how, typename T>
void forward(const Coupling& coupling, const CouplingMixForward& io, const Launch& on) {
  View x = io.x, params = io.params, z = io.z, extra = io.extra.view.data ? io.extra.view : io.z;
  View* views[] = {&x, &params, &z, &extra};
  const Columns columns = join_samples({coupling.batch, coupling.positions}, views, 4);
  MixForwardJob<T> job(coupling, columns);
  job.weight = static_cast<const T*>(io.weight);
  job.bias = static_cast<const T*>(io.bias);
  const int channels = job.k.channels, rows = padded_rows<how>(channels), tile = rows * kPitch<N, how>;
  const auto move = [&](const View& v, DType type, int count, int padded, int at) {
    return Move{tile_view(v, type, count, columns), type, count, padded, at};
  };
  job.loads.add(move(x, coupling.data, channels, rows, 0));
  job.loads.add(move(params, coupling.raw, job.k.params_rows, job.k.params_rows, 2 * tile));
  job.stores.add(move(z, coupling.data, channels, channels, tile));
  if (io.extra.view.data) {
    job.extra_start = static_cast<int>(io.extra.start);
    job.extra_count = static_cast<int>(io.extra.count);
    job.stores.add(
        move(extra, io.extra.type, job.extra_count, job.extra_count, tile + job.extra_start * kPitch<N, how>));
  }
  job.tiles = ceil_div(job.k.columns, N);
  job.tiles_per_block = job.tiles > 8192 ? 8 : ceil_div(job.tiles, 1024);
  job.partial = static_cast<T*>(on.scratch((job.tiles + coupling.batch) * sizeof(T)));
  if (coupling.channels > 0 && job.tiles > 0)
    launch(mix_forward<N, how, T>, on, ceil_div(job.tiles, job.tiles_per_block), kMixThreads,
           forward_shared<N, how>(job.k), job);
  launch(sum_log_parts<T>, on, ceil_div(coupling.batch, kMixWarps), kMixThreads, 0, job.partial, coupling.batch,
         coupling.channels > 0 ? coupling.positions : 0, N, static_cast<const T*>(io.logdet_in), io.logdet_in_stride,
         static_cast<T*>(io.logdet));
}

}  // namespace

void coupling_mix_forward(const Coupling& k, const CouplingMixForward& io, const Launch& on) {
  if (k.data == DType::f64)
    forward<32, Product::plain, double>(k, io, on);
  else if (k.channels < kTensorChannels)
    forward<128, Product::fma, float>(k, io, on);
  else
    forward<64, Product::tensor, float>(k, io, on);
}

}  // namespace cuda
}  // namespace nf
