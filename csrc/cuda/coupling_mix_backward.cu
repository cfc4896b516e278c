// The gradients of z = W coupling(x) + bias from z, one pass: y = W^-1 (z - bias), dy = W^T dz, the coupling's gradient
// from y, and the sums dW = sum dz y^T and dbias = sum dz.
//
// Tiles are cut into chunks by shape alone, a block takes a chunk, and the chunks' sums are added in order.

#include "coupling_mix_tile.h"

namespace nf {
namespace cuda {
namespace {

template <typename T>
struct MixBackwardJob {
  TiledCoupling<T> k;
  Moves<4> loads;   // z, params; dz, dextra
  Moves<3> stores;  // dx, dparams; x
  const T *weight = nullptr, *inverse = nullptr, *bias = nullptr, *dlogdet = nullptr;
  int64_t dlogdet_stride = 0;
  T* partial = nullptr;  // [chunks][partial_size = C * C + C + transformed]: of dW, dbias and dgain
  int extra_start = 0, extra_count = 0;
  bool has_dz = false, need_dweight = false, need_dbias = false, rebuild = false;
  int64_t tiles = 0, chunks = 0, partial_size = 0;

  MixBackwardJob(const Coupling& coupling, const Columns& columns) : k(coupling, columns) {}
};

// dW with plain FMA: blocks of 4 x 4 whose rows and columns are strided (neighbouring threads read neighbouring rows),
// each made by several threads that take every so many columns.
template <int kPerThread, typename T>
struct OuterFma {
  T acc[kPerThread][4][4];
  int side, blocks, teams;

  NF_DEVICE explicit OuterFma(int channels) {
    side = (channels + 3) / 4;
    blocks = side * side;
    teams = kPerThread > 1 || blocks == 0 ? 1 : kMixThreads / blocks;
#pragma unroll
    for (int u = 0; u < kPerThread; ++u)
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b) acc[u][a][b] = T(0);
  }

  template <int N>
  NF_DEVICE void add(const T* dz, const T* y, int pitch) {
    const int tid = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
      const int block = kPerThread > 1 ? tid + u * kMixThreads : tid % blocks;
      const int team = kPerThread > 1 ? (block < blocks ? 0 : 1) : tid / blocks;
      if (team >= teams) continue;
      const T* rows = dz + block / side * pitch;
      const T* cols = y + block % side * pitch;
#pragma unroll 1
      for (int n = team * 4; n < N; n += teams * 4) {
        Pack<T, 4> left[4];
#pragma unroll
        for (int a = 0; a < 4; ++a) left[a] = load_pack<4>(rows + a * side * pitch + n);
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const Pack<T, 4> right = load_pack<4>(cols + b * side * pitch + n);
#pragma unroll
          for (int a = 0; a < 4; ++a)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[u][a][b] += left[a][e] * right[e];
        }
      }
    }
  }

  // `shared`: as many elements as kReduce says, free for use.
  NF_DEVICE void write(int channels, T* shared, T* out) {
    const int tid = static_cast<int>(threadIdx.x);
    if constexpr (kPerThread > 1) {
#pragma unroll
      for (int u = 0; u < kPerThread; ++u) {
        const int block = tid + u * kMixThreads;
#pragma unroll
        for (int a = 0; a < 4; ++a)
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const int o = block / side + a * side, c = block % side + b * side;
            if (block < blocks && o < channels && c < channels) out[o * channels + c] = acc[u][a][b];
          }
      }
    } else {
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b) shared[(a * 4 + b) * kMixThreads + tid] = acc[0][a][b];
      sync_block();
      for (int i = tid; i < channels * channels; i += kMixThreads) {
        const int o = i / channels, c = i % channels, block = o % side * side + c % side;
        T sum = T(0);
        for (int team = 0; team < teams; ++team)
          sum += shared[(o / side * 4 + c / side) * kMixThreads + team * blocks + block];
        out[i] = sum;
      }
    }
  }
};

// dW on tensor cores: warps take the 16 x 16 blocks in turn.
struct OuterTensor {
  float acc[4][1][2][4];

  NF_DEVICE explicit OuterTensor(int) {
#pragma unroll
    for (int u = 0; u < 4; ++u)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[u][0][j][e] = 0.0f;
  }

  template <int N>
  NF_DEVICE void add(const float* dz, const float* y, int pitch, int channels) {
    const int side = (channels + 15) / 16;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int block = warp() + u * kMixWarps;
      if (block < side * side)
        multiply_rows<1, 2>(dz + block / side * 16 * pitch, y + block % side * 16 * pitch, pitch, N / 8, acc[u]);
    }
  }

  NF_DEVICE void write(int channels, float*, float* out) {
    const int side = (channels + 15) / 16;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int block = warp() + u * kMixWarps;
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int o = block / side * 16 + lane() / 4 + e / 2 * 8;
          const int c = block % side * 16 + j * 8 + lane() % 4 * 2 + e % 2;
          if (block < side * side && o < channels && c < channels) out[o * channels + c] = acc[u][0][j][e];
        }
    }
  }
};

template <Product how, typename T>
using Outer = std::conditional_t<how == Product::tensor, OuterTensor, OuterFma<how == Product::plain ? 2 : 1, T>>;

// Elements of three tiles [rows][pitch], which also hold what OuterFma reduces.
template <int N, Product how>
NF_FN int tiles_size(int channels) {
  const int size = 3 * padded_rows<how>(channels) * kPitch<N, how>;
  return how == Product::fma && size < 16 * kMixThreads ? 16 * kMixThreads : size;
}

// What registers are to leave room for on a multiprocessor.
template <Product how>
constexpr int kBlocksAtOnce = how == Product::fma      ? 4
                              : how == Product::tensor ? 3
                                                       : 2;

// Shared memory: z, later dy and dx; dz; y, later x; params; both matrices; bias [64]; dlogdet [N]; gains [64]; and
// halves of dbias [128].
template <int N, Product how, typename T>
size_t backward_shared(const TiledCoupling<T>& k) {
  return (tiles_size<N, how>(k.channels) + k.params_rows * kPitch<N, how> + 2 * matrix_size<how>(k.channels) + 128 + N +
          kMixThreads) *
         sizeof(T);
}

template <int N, Product how, typename T>
__global__ __launch_bounds__(kMixThreads, kBlocksAtOnce<how>) void mix_backward(MixBackwardJob<T> job) {
  constexpr int pitch = kPitch<N, how>;
  const TiledCoupling<T>& k = job.k;
  const int channels = k.channels, rows = padded_rows<how>(channels), tid = static_cast<int>(threadIdx.x);
  NF_SHARED(T, z);
  T *dz = z + rows * pitch, *y = dz + rows * pitch, *params = z + tiles_size<N, how>(channels);
  T *matrix_at = params + k.params_rows * pitch, *other_at = matrix_at + matrix_size<how>(channels);
  T *bias = other_at + matrix_size<how>(channels), *dlogdet = bias + 64, *gains = dlogdet + N, *halves = gains + 64;
  const Matrix<how, T> inverse = load_matrix<how>(job.inverse, channels, false, matrix_at);
  const Matrix<how, T> transposed = load_matrix<how>(job.weight, channels, true, other_at);
  if (tid < 64) {
    bias[tid] = job.bias && tid < channels ? job.bias[tid] : T(0);
    gains[tid] = T(0);
  }
  Outer<how, T> outer(channels);
  T dbias = T(0);  // of row tid % 64, half of the columns
  const int64_t end = job.tiles * (blockIdx.x + 1) / job.chunks;
#pragma unroll 1
  for (int64_t i = job.tiles * blockIdx.x / job.chunks; i < end; ++i) {
    const TilePlace at = tile_place(i * N, k.columns, k.positions);
    sync_block();
#pragma unroll 1
    for (int m = 0; m < job.loads.count; ++m) load_move<N, pitch>(job.loads.list[m], at, z);
    copy_commit();
    if (!job.has_dz)
      for (int e = tid; e < rows * pitch; e += kMixThreads) dz[e] = T(0);
    for (int j = tid; j < N; j += kMixThreads) {
      const int64_t column = i * N + j;
      dlogdet[j] = job.dlogdet && column < k.columns ? job.dlogdet[column / k.sample * job.dlogdet_stride] : T(0);
    }
    copy_wait<0>();
    sync_block();
    if (job.extra_count > 0) {
      for (int e = tid; e < job.extra_count * N; e += kMixThreads) {
        const int at_row = e / N, col = e % N;
        dz[(job.extra_start + at_row) * pitch + col] += y[at_row * pitch + col];
      }
      sync_block();
    }
    multiply<N, true>(inverse, z, bias, static_cast<const T*>(nullptr), y, pitch);
    sync_block();
    multiply<N, false>(transposed, dz, static_cast<const T*>(nullptr), static_cast<const T*>(nullptr), z, pitch);
    if (job.need_dweight) {
      if constexpr (how == Product::tensor)
        outer.template add<N>(dz, y, pitch, channels);
      else
        outer.template add<N>(dz, y, pitch);
    }
    if (job.need_dbias && tid % 64 < channels) {
      const T* row = dz + tid % 64 * pitch + tid / 64 * (N / 2);
      T sums[4] = {};
#pragma unroll 4
      for (int n = 0; n < N / 2; n += 4) {
        const Pack<T, 4> v = load_pack<4>(row + n);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[e] += v[e];
      }
      dbias += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    sync_block();
    couple_backward<N>(k, job.rebuild, y, z, params, pitch, dlogdet, k.gain ? gains : nullptr);
    sync_block();
#pragma unroll 1
    for (int m = 0; m < job.stores.count; ++m) store_move<N, pitch>(job.stores.list[m], at, z);
  }
  sync_block();
  T* out = job.partial + blockIdx.x * job.partial_size;
  if (job.need_dweight) outer.write(channels, z, out);
  out += channels * channels;
  if (job.need_dbias) {
    halves[tid] = dbias;
    sync_block();
    if (tid < channels) out[tid] = halves[tid] + halves[tid + 64];
  }
  out += channels;
  if (k.gain && tid < k.transformed) out[tid] = gains[tid];
}

template <int N, Product how, typename T>
void backward(const Coupling& coupling, const CouplingMixBackward& io, const Launch& on) {
  View z = io.z, params = io.params, dx = io.dx, dparams = io.dparams, dz = io.dz, x = io.x, dextra = io.dextra.view;
  // What is not there must not decide how columns are counted.
  if (!dz.data) dz = z;
  if (!x.data) x = z;
  if (!dextra.data) dextra = z;
  View* views[] = {&z, &params, &dx, &dparams, &dz, &x, &dextra};
  const Columns columns = join_samples({coupling.batch, coupling.positions}, views, 7);
  MixBackwardJob<T> job(coupling, columns);
  const int channels = job.k.channels, rows = padded_rows<how>(channels), tile = rows * kPitch<N, how>;
  const int params_rows = job.k.params_rows, params_at = tiles_size<N, how>(channels);
  const auto move = [&](const View& v, DType type, int count, int padded, int at) {
    return Move{tile_view(v, type, count, columns), type, count, padded, at};
  };
  job.loads.add(move(z, coupling.data, channels, rows, 0));
  job.loads.add(move(params, coupling.raw, params_rows, params_rows, params_at));
  job.has_dz = io.dz.data != nullptr;
  if (job.has_dz) job.loads.add(move(dz, coupling.data, channels, rows, tile));
  if (io.dextra.view.data) {
    job.extra_start = static_cast<int>(io.dextra.start);
    job.extra_count = static_cast<int>(io.dextra.count);
    job.loads.add(move(dextra, io.dextra.type, job.extra_count, job.extra_count, 2 * tile));
  }
  job.rebuild = io.x.data != nullptr;
  job.stores.add(move(dx, coupling.data, channels, channels, 0));
  job.stores.add(move(dparams, coupling.raw, params_rows, params_rows, params_at));
  if (job.rebuild) job.stores.add(move(x, coupling.data, channels, channels, 2 * tile));
  job.weight = static_cast<const T*>(io.weight);
  job.inverse = static_cast<const T*>(io.inverse);
  job.bias = static_cast<const T*>(io.bias);
  job.dlogdet = static_cast<const T*>(io.dlogdet);
  job.dlogdet_stride = io.dlogdet_stride;
  job.need_dweight = io.dweight != nullptr;
  job.need_dbias = io.dbias != nullptr;
  job.tiles = ceil_div(job.k.columns, N);
  // A chunk's sums take C * C values and more: for many channels there are no more chunks than two to a multiprocessor.
  if (channels >= kTensorChannels)
    job.chunks = job.tiles < 2 * kMultiprocessors ? job.tiles : 2 * kMultiprocessors;
  else
    job.chunks = job.tiles < 512 ? job.tiles : job.tiles < 4096 ? 512 : job.tiles < 16384 ? job.tiles / 8 : 2048;
  const int64_t square = coupling.channels * coupling.channels,
                size = square + coupling.channels + coupling.transformed;
  job.partial_size = size;
  job.partial = static_cast<T*>(on.scratch(job.chunks * size * sizeof(T)));
  if (coupling.channels > 0)
    launch(mix_backward<N, how, T>, on, job.chunks, kMixThreads, backward_shared<N, how>(job.k), job);
  sum_partials<T>(on, job.partial, job.chunks, {io.dweight, square}, {io.dbias, coupling.channels},
                  {io.dgain, coupling.transformed});
}

}  // namespace

void coupling_mix_backward(const Coupling& k, const CouplingMixBackward& io, const Launch& on) {
  if (k.data == DType::f64)
    backward<32, Product::plain, double>(k, io, on);
  else if (k.channels < kTensorChannels)
    backward<64, Product::fma, float>(k, io, on);
  else
    backward<32, Product::tensor, float>(k, io, on);
}

}  // namespace cuda
}  // namespace nf
