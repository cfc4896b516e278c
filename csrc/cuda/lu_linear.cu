// The LU-factored linear map: two triangles swept over tiles of columns in shared memory (triangle_sweep.h), as
// products or as solves, transposed for the gradient; the factors' gradients by way of the dense matrix's.
//
// Both triangles are first put into one matrix, by columns, which every block then keeps in shared memory: 64 columns
// of 128 float32 channels fit beside it on every GPU. A thread owns a column, or above kAlone channels two threads
// share one. Double precision above kAlone channels reads the matrix through the cache.

#include "../include/kernels.h"
#include "../include/triangle_sweep.h"
#include "channel_mix_parts.h"

namespace nf {
namespace cuda {

void channel_mix_backward(const MixBackward&, const Launch&);
void lu_compose_backward(const LUComposeBackward&, const Launch&);

namespace {

constexpr int kThreads = 128;
constexpr int kBlock = 4;            // rows that are computed at once
constexpr int64_t kAlone = 64;       // channels up to which a thread has a column to itself
constexpr int64_t kMostSwept = 128;  // channels at most

// The factors as the sweeps want them, in scratch; `size` is channels padded to whole blocks of rows.
template <typename T>
struct Swept {
  T* matrix;   // [size][size], by columns
  T* shift;    // [size] or null
  int* place;  // [size]: of a channel in a permuted tile, or null for none
  int channels, size;
  bool transposed;
};

template <typename T>
__global__ __launch_bounds__(kThreads) void arrange(LUFactors lu, const T* bias, bool solve, Swept<T> to) {
  const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int n = to.channels, i = first / to.size, j = first % to.size;
  const T *lower = static_cast<const T*>(lu.lower), *upper = static_cast<const T*>(lu.upper);
  if (first < to.size) {
    // An index outside would write past a tile; what it stands for is nobody's.
    int64_t place = to.place && first < n ? lu.permutation[first] : first;
    if (place < 0 || place >= to.size) place = first;
    if (to.place) to.place[first] = static_cast<int>(place);
    if (to.shift) to.shift[place] = first < n ? bias[first] : T(0);
  }
  if (i >= to.size) return;
  T value = T(0);
  if (i == j) {
    const double sign = i < n && lu.sign ? static_cast<double>(static_cast<const T*>(lu.sign)[i]) : 1.0;
    const double s =
        i < n ? diagonal_value(lu.diagonal, static_cast<double>(static_cast<const T*>(lu.log_s)[i]), sign, lu.eps)
              : 1.0;
    value = static_cast<T>(solve ? 1.0 / s : s);
  } else if (i < n && j < n) {
    value = (j < i ? lower : upper)[i * n + j];
  }
  to.matrix[to.transposed ? i * to.size + j : j * to.size + i] = value;
}

// Columns of a tile that a thread, or `parts` neighbouring ones, sweep.
template <typename T, int shared_by>
struct OwnColumn {
  using Scalar = T;
  using Value = T;
  static constexpr int parts = shared_by;
  T* data;
  int pitch, part;

  static NF_DEVICE T fill(T a) { return a; }
  template <int R>
  static NF_DEVICE Pack<T, R> at(const T* address) {
    return load_pack<R>(address);
  }
  static NF_DEVICE void add(T& sum, T a, T x) { sum += a * x; }
  static NF_DEVICE T scaled_difference(T x, T y, T a) { return (x - y) * a; }
  static NF_DEVICE T whole(T sum) {
#pragma unroll
    for (int mask = 1; mask < parts; mask *= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }
  NF_DEVICE T load(int row) const { return data[row * pitch]; }
  NF_DEVICE void store(int row, T v) const { data[row * pitch] = v; }
};

struct Permuted {
  const int* rows;  // or null
  NF_DEVICE int operator()(int row) const { return rows ? rows[row] : row; }
};

template <typename T>
struct SweepTask {
  TileView x, y, wide;  // wide.data: y once more, in the arithmetic's type; or null
  int64_t count, positions;
  Swept<T> factors;
  bool permute_in, permute_out;
};

// Rows four apart are half the banks apart: that is where the parts of a column read, and where turned tiles are
// written.
template <int N>
constexpr int kSweepPitch = N + 4;

template <typename T, int N>
size_t sweep_bytes(int64_t size, bool keep) {
  return (keep ? size * size : 0) * sizeof(T) + size * kSweepPitch<N> * sizeof(T) + size * (sizeof(T) + sizeof(int));
}

template <DType d, bool solve, int parts, bool keep>
__global__ __launch_bounds__(kThreads, 8) void sweep_columns(SweepTask<Arithmetic<d>> k) {
  using T = Arithmetic<d>;
  constexpr int N = kThreads / parts, pitch = kSweepPitch<N>;
  const int size = k.factors.size, channels = k.factors.channels, tid = static_cast<int>(threadIdx.x);
  NF_SHARED(T, shared);
  T* tile = shared + (keep ? size * size : 0);
  T* shift = tile + size * pitch;
  int* place = reinterpret_cast<int*>(shift + size);
  if constexpr (keep) {
    constexpr int V = 16 / sizeof(T);
    for (int i = tid * V; i < size * size; i += kThreads * V) copy_async<16>(shared + i, k.factors.matrix + i);
    copy_commit();
  }
  for (int i = tid; i < size; i += kThreads) {
    if (k.factors.shift) shift[i] = k.factors.shift[i];
    if (k.factors.place) place[i] = k.factors.place[i];
  }
  const Triangles<T> triangles{keep ? shared : k.factors.matrix, k.factors.shift ? shift : nullptr, size, size,
                               k.factors.transposed};
  const int* rows = k.factors.place ? place : nullptr;
  const Permuted in{k.permute_in ? rows : nullptr}, out{k.permute_out ? rows : nullptr};
  const OwnColumn<T, parts> own{tile + tid / parts, pitch, tid % parts};
  sync_block();
  for (int64_t first = blockIdx.x * int64_t{N}; first < k.count; first += gridDim.x * int64_t{N}) {
    const TilePlace at = tile_place(first, k.count, k.positions);
    load_tile<d, N>(k.x, at, channels, 0, size, tile, pitch, in);
    copy_commit();
    copy_wait<0>();
    sync_block();
    sweep_both<kBlock, solve>(own, triangles);
    sync_block();
    store_tile<d, N>(k.y, at, channels, 0, channels, tile, pitch, out);
    if (k.wide.data) {
      if constexpr (d == DType::bf16 || d == DType::f16)
        store_tile<DType::f32, N>(k.wide, at, channels, 0, channels, tile, pitch, out);
    }
    sync_block();
  }
}

// 16-bit data in float32, [channels, columns].
template <DType d>
__global__ __launch_bounds__(kThreads) void widen(TileView from, TileView to, int channels, int64_t count,
                                                  int64_t positions) {
  NF_SHARED(float, tile);
  const TilePlace at = tile_place(blockIdx.x * int64_t{kThreads}, count, positions);
  for (int first = 0; first < channels; first += 16) {
    load_tile<d, kThreads>(from, at, channels, first, 16, tile, kSweepPitch<kThreads>);
    sync_block();
    store_tile<DType::f32, kThreads>(to, at, channels, first, 16, tile, kSweepPitch<kThreads>);
    sync_block();
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void negate(T* values, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) values[i] = -values[i];
}

template <typename T>
Swept<T> arranged(const LUFactors& lu, const void* bias, bool transposed, bool solve, const Launch& on) {
  Swept<T> to;
  to.channels = static_cast<int>(lu.channels);
  to.size = static_cast<int>(ceil_div(lu.channels, kBlock) * kBlock);
  to.transposed = transposed;
  to.matrix = static_cast<T*>(on.scratch(int64_t{to.size} * to.size * sizeof(T)));
  to.shift = bias ? static_cast<T*>(on.scratch(to.size * sizeof(T))) : nullptr;
  to.place = lu.permutation ? static_cast<int*>(on.scratch(to.size * sizeof(int))) : nullptr;
  launch(arrange<T>, on, ceil_div(int64_t{to.size} * to.size, kThreads), kThreads, 0, lu, static_cast<const T*>(bias),
         solve, to);
  return to;
}

template <DType d, bool solve, int parts, bool keep>
void launch_sweep(const SweepTask<Arithmetic<d>>& task, const Launch& on) {
  constexpr int N = kThreads / parts;
  const size_t bytes = sweep_bytes<Arithmetic<d>, N>(task.factors.size, keep);
  const int64_t resident = at_most(at_least(kSharedEverywhere * 2 / static_cast<int64_t>(bytes), 1), 8);
  launch(sweep_columns<d, solve, parts, keep>, on, at_most(ceil_div(task.count, N), on.multiprocessors * resident),
         kThreads, bytes, task);
}

template <DType d, bool solve>
void sweep_as(const SweepTask<Arithmetic<d>>& task, const Launch& on) {
  if (task.factors.size <= (d == DType::f64 ? kAlone / 2 : kAlone)) return launch_sweep<d, solve, 1, true>(task, on);
  if constexpr (d == DType::f64) {
    task.factors.size <= kAlone ? launch_sweep<d, solve, 2, true>(task, on)
                                : launch_sweep<d, solve, 2, false>(task, on);
  } else {
    launch_sweep<d, solve, 2, true>(task, on);
  }
}

template <DType d>
void sweep_all(SweepTask<Arithmetic<d>> task, bool solve, const Launch& on) {
  // P stands outside the triangles: at the output of products and of transposed solves, else at the input.
  task.permute_out = solve == task.factors.transposed;
  task.permute_in = !task.permute_out;
  solve ? sweep_as<d, true>(task, on) : sweep_as<d, false>(task, on);
}

template <DType d>
void forward(const LULinearForward& k, const Launch& on) {
  using T = Arithmetic<d>;
  View x = k.x, y = k.y;
  View* views[] = {&x, &y};
  const Columns columns = join_samples({k.batch, k.positions}, views, 2);
  if (columns.count() == 0 || k.lu.channels == 0) return;
  const auto view = [&](const View& v) { return tile_view(v, d, k.lu.channels, columns); };
  sweep_all<d>({view(x),
                view(y),
                {},
                columns.count(),
                columns.positions,
                arranged<T>(k.lu, k.bias, false, k.inverse, on),
                false,
                false},
               k.inverse, on);
}

template <DType d>
void backward(const LULinearBackward& k, const Launch& on) {
  using T = Arithmetic<d>;
  constexpr bool narrow = d == DType::bf16 || d == DType::f16;
  const int64_t channels = k.lu.channels, square = channels * channels, all = k.batch * k.positions;
  const bool sums = k.dlower || k.dbias;
  const bool wanted = k.dx.data || (k.inverse && sums);
  // Inverted, the gradient of W is made of dx. Where dx itself is not wanted, or would be rounded first, in scratch.
  const bool apart = k.inverse && sums && (narrow || !k.dx.data);
  MixBackward mix{};
  mix.data = d;
  mix.batch = k.batch;
  mix.channels = channels;
  mix.positions = k.positions;
  mix.x = k.x;
  mix.dy = k.inverse ? k.dx : k.dy;
  if (wanted && channels && all) {
    View dy = k.dy, dx = k.dx.data ? k.dx : k.dy, x = k.x;
    View* views[] = {&dy, &dx, &x};
    const Columns columns = join_samples({k.batch, k.positions}, views, 3);
    const auto view = [&](const View& v) { return tile_view(v, d, channels, columns); };
    // [channels, columns] with the samples apart as in the tensors.
    View own{nullptr, columns.positions, columns.count(), 1};
    const auto scratch = [&] {
      View made = own;
      made.data = on.scratch(channels * columns.count() * sizeof(T));
      return made;
    };
    SweepTask<T> task{
        view(dy), view(dx), {}, columns.count(), columns.positions, arranged<T>(k.lu, nullptr, true, k.inverse, on),
        false,    false};
    if (apart) {
      const View made = scratch();
      const TileView to = tile_view(made, narrow ? DType::f32 : d, channels, columns);
      mix.dy = made;
      mix.batch = columns.batch;
      mix.positions = columns.positions;
      mix.x = x;
      if constexpr (narrow) {
        task.wide = to;
        if (!k.dx.data) task.y = view({on.scratch(channels * columns.count() * 2), own.b, own.c, own.p});
        mix.data = DType::f32;
        mix.x = scratch();
        launch(widen<d>, on, ceil_div(columns.count(), kThreads), kThreads, 16 * kSweepPitch<kThreads> * sizeof(float),
               view(x), tile_view(mix.x, DType::f32, channels, columns), static_cast<int>(channels), columns.count(),
               columns.positions);
      } else {
        task.y = to;
      }
    }
    sweep_all<d>(task, k.inverse, on);
  }
  if (!sums) return;
  auto* dweight = static_cast<T*>(k.dlower ? on.scratch(square * sizeof(T)) : nullptr);
  mix.dweight = dweight;
  mix.dbias = k.dbias;
  channel_mix_backward(mix, on);
  if (k.inverse) {
    if (k.dlower) launch(negate<T>, on, ceil_div(square, kThreads), kThreads, 0, dweight, static_cast<int>(square));
    if (k.dbias)
      launch(negate<T>, on, ceil_div(channels, kThreads), kThreads, 0, static_cast<T*>(k.dbias),
             static_cast<int>(channels));
  }
  if (!k.dlower) return;
  LUComposeBackward compose{};
  compose.lu = k.lu;
  compose.dweight = dweight;
  compose.dlower = k.dlower;
  compose.dupper = k.dupper;
  compose.dlog_s = k.dlog_s;
  lu_compose_backward(compose, on);
}

void check(const LUFactors& lu) {
  if (lu.channels > kMostSwept)
    throw std::runtime_error("nfkernels: lu_linear's CUDA kernels serve at most 128 channels");
}

}  // namespace

void lu_linear_forward(const LULinearForward& k, const Launch& on) {
  check(k.lu);
  k.data == DType::f32    ? forward<DType::f32>(k, on)
  : k.data == DType::f64  ? forward<DType::f64>(k, on)
  : k.data == DType::bf16 ? forward<DType::bf16>(k, on)
                          : forward<DType::f16>(k, on);
}

void lu_linear_backward(const LULinearBackward& k, const Launch& on) {
  check(k.lu);
  k.data == DType::f32    ? backward<DType::f32>(k, on)
  : k.data == DType::f64  ? backward<DType::f64>(k, on)
  : k.data == DType::bf16 ? backward<DType::bf16>(k, on)
                          : backward<DType::f16>(k, on);
}

}  // namespace cuda
}  // namespace nf
