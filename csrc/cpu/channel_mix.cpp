// Channel mix (1x1 convolution) on the CPU: y = W x + b at every position, and dx, dW, db in one pass over x and dy.
//
// All positions of all samples are columns; a tile is up to 256 of them. A tile whose rows lie at unit stride in the
// arithmetic's type is used in place, any other (channels-last, small images, tables, bf16) is packed to [C, tile]
// first. Column chunks are cut by shape alone and summed in order, so results do not depend on the thread count.

#include <cstdlib>
#include <new>

#include "convert.h"
#include "isa.h"
#include "processor.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int kTile = 256;
constexpr int kRows = 6;                                 // output channels per block
constexpr int kVectors = NF_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of columns per block: kRows * kVectors accumulators
constexpr int kDot = NF_VECTOR_BYTES == 64 ? 4 : 3;      // dW is made in blocks of kDot x kDot
constexpr int64_t kChunks = 64;                          // partial dW at most
constexpr int64_t kTilesPerChunk = 8;                    // what a chunk's lane sums cost is then a few percent
constexpr int64_t kWork = 1 << 18;                       // multiply-adds worth a thread

template <typename T>
struct Simd {
  typedef T type __attribute__((vector_size(NF_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = NF_VECTOR_BYTES / sizeof(T);
  static type load(const T* p) { return *reinterpret_cast<const type*>(p); }
  static void store(T* p, type v) { *reinterpret_cast<type*>(p) = v; }
};

template <typename T>
constexpr int group() {
  return kVectors * Simd<T>::lanes;
}

// y[r, :] = bias[r] + sum_k w[r, k] x[k, :] for `rows` output channels and one group of columns.
template <typename T, int rows>
void multiply_rows(const T* w, int64_t channels, const T* bias, const T* x, int64_t ldx, T* y, int64_t ldy) {
  using V = Simd<T>;
  typename V::type acc[rows][kVectors];
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < kVectors; ++v) acc[r][v] = typename V::type{} + (bias ? bias[r] : T(0));
  for (int64_t k = 0; k < channels; ++k) {
    typename V::type in[kVectors];
    NF_UNROLL
    for (int v = 0; v < kVectors; ++v) in[v] = V::load(x + k * ldx + v * V::lanes);
    NF_UNROLL
    for (int r = 0; r < rows; ++r) NF_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] += w[r * channels + k] * in[v];
  }
  NF_UNROLL
  for (int r = 0; r < rows; ++r) NF_UNROLL
  for (int v = 0; v < kVectors; ++v) V::store(y + r * ldy + v * V::lanes, acc[r][v]);
}

// Rows a power of two apart fall into few cache sets, so from a few row blocks on a group's columns are first copied
// into `panel` [channels, group], where each row is read once per block.
template <typename T>
void multiply_tile(const T* w, int64_t channels, const T* bias, const T* x, int64_t ldx, T* y, int64_t ldy, int columns,
                   T* panel) {
  using F = void (*)(const T*, int64_t, const T*, const T*, int64_t, T*, int64_t);
  static const F table[] = {nullptr,
                            multiply_rows<T, 1>,
                            multiply_rows<T, 2>,
                            multiply_rows<T, 3>,
                            multiply_rows<T, 4>,
                            multiply_rows<T, 5>,
                            multiply_rows<T, 6>};
  const bool copy = channels > 2 * kRows;
  for (int n = 0; n < columns; n += group<T>()) {
    if (copy)
      for (int64_t k = 0; k < channels; ++k)
        std::memcpy(panel + k * group<T>(), x + k * ldx + n, group<T>() * sizeof(T));
    const T* in = copy ? panel : x + n;
    const int64_t ld = copy ? group<T>() : ldx;
    for (int64_t o = 0; o < channels; o += kRows) {
      const int64_t rows = channels - o < kRows ? channels - o : kRows;
      table[rows](w + o * channels, channels, bias ? bias + o : nullptr, in, ld, y + o * ldy + n, ldy);
    }
  }
}

// acc[i][j] (a vector each) += dy[i, :] * x[j, :] over the tile's columns.
template <typename T, int rows, int cols>
void outer_block(const T* dy, int64_t ldy, const T* x, int64_t ldx, int columns, T* acc) {
  using V = Simd<T>;
  typename V::type sum[rows][cols];
  NF_UNROLL
  for (int i = 0; i < rows; ++i) NF_UNROLL
  for (int j = 0; j < cols; ++j) sum[i][j] = V::load(acc + (i * kDot + j) * V::lanes);
  for (int n = 0; n < columns; n += V::lanes) {
    typename V::type b[cols];
    NF_UNROLL
    for (int j = 0; j < cols; ++j) b[j] = V::load(x + j * ldx + n);
    NF_UNROLL
    for (int i = 0; i < rows; ++i) {
      const typename V::type a = V::load(dy + i * ldy + n);
      NF_UNROLL
      for (int j = 0; j < cols; ++j) sum[i][j] += a * b[j];
    }
  }
  NF_UNROLL
  for (int i = 0; i < rows; ++i) NF_UNROLL
  for (int j = 0; j < cols; ++j) V::store(acc + (i * kDot + j) * V::lanes, sum[i][j]);
}

template <typename T>
void outer_tile(const T* dy, int64_t ldy, const T* x, int64_t ldx, int64_t channels, int columns, T* acc) {
  using F = void (*)(const T*, int64_t, const T*, int64_t, int, T*);
#define NF_ROW(R)                                                                             \
  {                                                                                           \
    outer_block<T, R, 1>, outer_block<T, R, 2>, outer_block<T, R, 3>, outer_block<T, R, kDot> \
  }
  static const F table[4][4] = {NF_ROW(1), NF_ROW(2), NF_ROW(3), NF_ROW(kDot)};
#undef NF_ROW
  for (int64_t o = 0; o < channels; o += kDot)
    for (int64_t k = 0; k < channels; k += kDot) {
      const int64_t rows = channels - o < kDot ? channels - o : kDot, cols = channels - k < kDot ? channels - k : kDot;
      table[rows - 1][cols - 1](dy + o * ldy, ldy, x + k * ldx, ldx, columns, acc);
      acc += kDot * kDot * Simd<T>::lanes;
    }
}

// --- packing ---------------------------------------------------------------------------------------------------------

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

  template <typename T>
  static Plan make(DType data, int64_t batch, int64_t positions, const View* const* views, int n) {
    Plan plan;
    plan.columns = batch * positions;
    plan.in_place = data == native<T>() && positions > 0 && positions % group<T>() == 0;
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

// Aligned scratch, released at the end of its scope.
template <typename T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t n) {
    const size_t bytes = (n * sizeof(T) / 64 + 1) * 64;
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data) throw std::bad_alloc();
    std::memset(data, 0, bytes);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardJob {
  const MixForward& k;
  Plan plan;

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<ForwardJob*>(self);
    const MixForward& k = job.k;
    const auto* w = static_cast<const T*>(k.weight);
    const auto* bias = static_cast<const T*>(k.bias);
    const Packing<T> packing = packing_for<T>(k.data);
    Buffer<T> in(job.plan.in_place ? 0 : k.channels * kTile), out(job.plan.in_place ? 0 : k.channels * kTile);
    Buffer<T> panel(k.channels * group<T>());
    for (int64_t i = begin; i < end; ++i) {
      int64_t n0;
      int count;
      job.plan.tile(i, k.positions, &n0, &count);
      if (job.plan.in_place) {
        multiply_tile<T>(w, k.channels, bias, column<T>(k.x, n0, k.positions), k.x.c, column<T>(k.y, n0, k.positions),
                         k.y.c, count, panel.data);
      } else {
        packing.pack(k.x, k.channels, k.positions, n0, n0 + count, in.data);
        multiply_tile<T>(w, k.channels, bias, in.data, kTile, out.data, kTile, padded<T>(count), panel.data);
        packing.unpack(k.y, k.channels, k.positions, n0, n0 + count, out.data);
      }
    }
  }
};

template <typename T>
void forward(const MixForward& k, const Launch& on) {
  const View* views[] = {&k.x, &k.y};
  ForwardJob<T> job{k, Plan::make<T>(k.data, k.batch, k.positions, views, 2)};
  if (job.plan.tiles == 0) return;
  const int64_t work = job.plan.columns * k.channels * (k.channels + 8);
  on.parallel(job.plan.tiles, job.plan.grain(job.plan.tiles, work), &job, ForwardJob<T>::body);
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardJob {
  const MixBackward& k;
  Plan plan;
  const T* transposed;  // W^T
  T* dweight;           // [chunks, C, C]
  T* dbias;             // [chunks, C]

  int64_t blocks() const { return (k.channels + kDot - 1) / kDot; }

  void chunk(int64_t i, T* in, T* grad, T* out, T* acc, T* sums, T* panel) const {
    constexpr int lanes = Simd<T>::lanes;
    const int64_t channels = k.channels, acc_size = blocks() * blocks() * kDot * kDot * lanes;
    const Packing<T> packing = packing_for<T>(k.data);
    std::memset(acc, 0, acc_size * sizeof(T));
    std::memset(sums, 0, channels * lanes * sizeof(T));
    for (int64_t j = plan.tiles * i / plan.chunks; j < plan.tiles * (i + 1) / plan.chunks; ++j) {
      int64_t n0;
      int count;
      plan.tile(j, k.positions, &n0, &count);
      const T *x = in, *dy = grad;
      int64_t ldx = kTile, ldy = kTile, ldo = kTile;
      T* dx = out;
      if (plan.in_place) {
        x = column<T>(k.x, n0, k.positions), ldx = k.x.c;
        dy = column<T>(k.dy, n0, k.positions), ldy = k.dy.c;
        if (k.dx.data) dx = column<T>(k.dx, n0, k.positions), ldo = k.dx.c;
      } else {
        packing.pack(k.dy, channels, k.positions, n0, n0 + count, grad);
        if (dweight) packing.pack(k.x, channels, k.positions, n0, n0 + count, in);
      }
      const int whole = padded<T>(count);
      if (k.dx.data) multiply_tile<T>(transposed, channels, nullptr, dy, ldy, dx, ldo, whole, panel);
      if (dweight) outer_tile<T>(dy, ldy, x, ldx, channels, whole, acc);
      if (dbias)
        for (int64_t c = 0; c < channels; ++c) {
          auto sum = Simd<T>::load(sums + c * lanes);
          for (int n = 0; n < whole; n += lanes) sum += Simd<T>::load(dy + c * ldy + n);
          Simd<T>::store(sums + c * lanes, sum);
        }
      if (k.dx.data && !plan.in_place) packing.unpack(k.dx, channels, k.positions, n0, n0 + count, out);
    }
    // Halves added to halves: a chain of scalar additions would cost more than the products did.
    const auto total = [](T* v) {
      for (int half = lanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) v[l] += v[l + half];
      return v[0];
    };
    if (dweight)
      for (int64_t o = 0; o < channels; ++o)
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t block = o / kDot * blocks() + c / kDot, cell = o % kDot * kDot + c % kDot;
          dweight[(i * channels + o) * channels + c] = total(acc + (block * kDot * kDot + cell) * lanes);
        }
    if (dbias)
      for (int64_t c = 0; c < channels; ++c) dbias[i * channels + c] = total(sums + c * lanes);
  }

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<BackwardJob*>(self);
    const int64_t tile = job.plan.in_place ? 0 : job.k.channels * kTile;
    Buffer<T> in(tile), grad(tile), out(tile), sums(job.k.channels * Simd<T>::lanes);
    Buffer<T> panel(job.k.channels * group<T>());
    Buffer<T> acc(job.blocks() * job.blocks() * kDot * kDot * Simd<T>::lanes);
    for (int64_t i = begin; i < end; ++i) job.chunk(i, in.data, grad.data, out.data, acc.data, sums.data, panel.data);
  }
};

template <typename T>
void backward(const MixBackward& k, const Launch& on) {
  const View* views[] = {&k.x, &k.dy, &k.dx};
  const int64_t channels = k.channels, square = channels * channels;
  BackwardJob<T> job{k, Plan::make<T>(k.data, k.batch, k.positions, views, k.dx.data ? 3 : 2), nullptr, nullptr,
                     nullptr};
  const int64_t chunks = job.plan.chunks;
  Buffer<T> transposed(square), dweight(k.dweight ? chunks * square : 0), dbias(k.dbias ? chunks * channels : 0);
  const auto* w = static_cast<const T*>(k.weight);
  for (int64_t o = 0; o < channels; ++o)
    for (int64_t c = 0; c < channels; ++c) transposed.data[c * channels + o] = w[o * channels + c];
  job.transposed = transposed.data;
  job.dweight = k.dweight ? dweight.data : nullptr;
  job.dbias = k.dbias ? dbias.data : nullptr;
  const int64_t work = job.plan.columns * channels * (2 * channels + 8);
  if (chunks) on.parallel(chunks, job.plan.grain(chunks, work), &job, BackwardJob<T>::body);
  const auto reduce = [chunks](const T* partial, int64_t n, void* out) {
    for (int64_t i = 0; i < n; ++i) {
      T sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[c * n + i];
      static_cast<T*>(out)[i] = sum;
    }
  };
  if (k.dweight) reduce(dweight.data, square, k.dweight);
  if (k.dbias) reduce(dbias.data, channels, k.dbias);
}

}  // namespace

void channel_mix_forward(const MixForward& k, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, on) : forward<float>(k, on);
}

void channel_mix_backward(const MixBackward& k, const Launch& on) {
  k.data == DType::f64 ? backward<double>(k, on) : backward<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
