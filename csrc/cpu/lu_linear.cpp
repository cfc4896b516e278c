// The LU-factored linear map on the CPU: two triangles swept over tiles of columns (triangle_sweep.h), as products or
// as solves, transposed for the gradient.
//
// All positions of all samples are columns. A tile is packed to [rows, kTile] from any layout and type, with the
// permutation on its way in or out, swept a group of columns at a time, and unpacked. Column chunks are cut by shape
// alone and summed in order, so results do not depend on the thread count.

#include "../include/triangle_sweep.h"
#include "lu_tile.h"
#include "processor.h"

namespace nf {
namespace NF_ISA {

void lu_compose_backward(const LUComposeBackward&, const Launch&);  // lu_compose.cpp

namespace {

// The matrix as the sweeps want it, and which row of a permuted tile a channel has.
template <typename T>
struct Factors {
  int64_t channels, size;  // size: whole blocks of rows
  bool solve;
  Buffer<T> matrix, shift;
  Buffer<int64_t> place, straight;
  Triangles<T> triangles;

  Factors(const LUFactors& lu, const T* bias, bool transposed, bool solved)
      : channels(lu.channels),
        size((lu.channels + kRows - 1) / kRows * kRows),
        solve(solved),
        matrix(size * size),
        shift(size),
        place(channels),
        straight(channels),
        triangles{matrix.data, bias ? shift.data : nullptr, static_cast<int>(size), static_cast<int>(size),
                  transposed} {
    const int64_t n = channels;
    const auto *lower = static_cast<const T*>(lu.lower), *upper = static_cast<const T*>(lu.upper);
    const auto *log_s = static_cast<const T*>(lu.log_s), *sign = static_cast<const T*>(lu.sign);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        if (i != j) matrix.data[transposed ? i * size + j : j * size + i] = (j < i ? lower : upper)[i * n + j];
    for (int64_t i = 0; i < size; ++i) {
      const double s = i < n ? diagonal_value(lu.diagonal, log_s[i], sign ? sign[i] : 1.0, lu.eps) : 1.0;
      matrix.data[i * (size + 1)] = static_cast<T>(solve ? 1.0 / s : s);
    }
    for (int64_t i = 0; i < n; ++i) {
      straight.data[i] = i;
      place.data[i] = lu.permutation ? lu.permutation[i] : i;
      if (bias) shift.data[place.data[i]] = bias[i];
    }
  }

  // P stands outside the triangles: at the output of products and of transposed solves, else at the input.
  const int64_t* in() const { return solve == triangles.diagonal_below ? straight.data : place.data; }
  const int64_t* out() const { return solve == triangles.diagonal_below ? place.data : straight.data; }

  void sweep_tile(T* tile, int columns) const {
    for (int n = 0; n < columns; n += group<T>()) {
      const Group<T> unit{tile + n};
      solve ? sweep_both<kRows, true>(unit, triangles) : sweep_both<kRows, false>(unit, triangles);
    }
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardJob {
  const LULinearForward& k;
  const Factors<T>& factors;
  Plan plan;

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<ForwardJob*>(self);
    const LULinearForward& k = job.k;
    const Factors<T>& f = job.factors;
    const RowPacking<T> packing = row_packing_for<T>(k.data);
    Buffer<T> tile(f.size * pitch<T>());
    for (int64_t i = begin; i < end; ++i) {
      int64_t n0;
      int count;
      job.plan.tile(i, k.positions, &n0, &count);
      packing.pack(k.x, f.channels, k.positions, n0, n0 + count, f.in(), f.size, tile.data);
      f.sweep_tile(tile.data, padded<T>(count));
      packing.unpack(k.y, f.channels, k.positions, n0, n0 + count, f.out(), tile.data);
    }
  }
};

template <typename T>
void forward(LULinearForward k, const Launch& on) {
  View* views[] = {&k.x, &k.y};
  join_samples(k.batch, k.positions, views, 2);
  const Factors<T> factors(k.lu, static_cast<const T*>(k.bias), false, k.inverse);
  ForwardJob<T> job{k, factors, Plan::make<T>(DType::bf16, k.batch, k.positions, nullptr, 0)};
  if (job.plan.tiles == 0) return;
  const int64_t work = job.plan.columns * factors.channels * (factors.channels + 8);
  on.parallel(job.plan.tiles, job.plan.grain(job.plan.tiles, work), &job, ForwardJob<T>::body);
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardJob {
  const LULinearBackward& k;
  const Factors<T>& factors;
  Plan plan;
  T* dweight;  // [chunks, channels, channels]: of the matrix without its permutation
  T* dbias;    // [chunks, channels]: likewise

  void chunk(int64_t i, T* grad, T* x, MixSums<T>& sums) const {
    const Factors<T>& f = factors;
    const RowPacking<T> packing = row_packing_for<T>(k.data);
    sums.clear();
    for (int64_t j = plan.tiles * i / plan.chunks; j < plan.tiles * (i + 1) / plan.chunks; ++j) {
      int64_t n0;
      int count;
      plan.tile(j, k.positions, &n0, &count);
      const int whole = padded<T>(count);
      packing.pack(k.dy, f.channels, k.positions, n0, n0 + count, f.in(), f.size, grad);
      // The sums take the gradient where it stands before the permutation: what a product begins with, or a solve
      // ends with.
      if (f.solve) f.sweep_tile(grad, whole);
      if (dweight) {
        packing.pack(k.x, f.channels, k.positions, n0, n0 + count, f.straight.data, f.size, x);
        sums.add_products(grad, pitch<T>(), x, pitch<T>(), whole);
      }
      if (dbias) sums.add_sums(grad, pitch<T>(), whole);
      if (!f.solve && k.dx.data) f.sweep_tile(grad, whole);
      if (k.dx.data) packing.unpack(k.dx, f.channels, k.positions, n0, n0 + count, f.out(), grad);
    }
    if (dweight) sums.write_products(dweight + i * f.channels * f.channels);
    if (dbias) sums.write_sums(dbias + i * f.channels);
  }

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<BackwardJob*>(self);
    const int64_t tile = job.factors.size * pitch<T>();
    Buffer<T> grad(tile), x(job.dweight ? tile : 0);
    MixSums<T> sums(job.factors.channels);
    for (int64_t i = begin; i < end; ++i) job.chunk(i, grad.data, x.data, sums);
  }
};

template <typename T>
void backward(LULinearBackward k, const Launch& on) {
  View* views[] = {&k.dy, &k.x, k.dx.data ? &k.dx : &k.x};
  join_samples(k.batch, k.positions, views, k.dx.data ? 3 : 2);
  const int64_t channels = k.lu.channels, square = channels * channels;
  const Factors<T> factors(k.lu, nullptr, true, k.inverse);
  BackwardJob<T> job{k, factors, Plan::make<T>(DType::bf16, k.batch, k.positions, nullptr, 0), nullptr, nullptr};
  const int64_t chunks = job.plan.chunks;
  Buffer<T> dweight(k.dlower ? chunks * square : 0), dbias(k.dbias ? chunks * channels : 0);
  job.dweight = k.dlower ? dweight.data : nullptr;
  job.dbias = k.dbias ? dbias.data : nullptr;
  const int64_t work = job.plan.columns * channels * (2 * channels + 8);
  if (chunks) on.parallel(chunks, job.plan.grain(chunks, work), &job, BackwardJob<T>::body);
  const T side = k.inverse ? T(-1) : T(1);  // inverted, -dx stands where dy does
  if (k.dbias) {
    Buffer<T> sums(channels);
    add_partials(dbias.data, chunks, channels, sums.data);
    for (int64_t c = 0; c < channels; ++c) static_cast<T*>(k.dbias)[c] = side * sums.data[factors.place.data[c]];
  }
  if (!k.dlower) return;
  Buffer<T> sums(square);
  add_partials(dweight.data, chunks, square, sums.data);
  for (int64_t i = 0; i < square; ++i) sums.data[i] *= side;
  LUComposeBackward compose{};
  compose.lu = k.lu;
  compose.lu.permutation = nullptr;
  compose.dweight = sums.data;
  compose.dlower = k.dlower;
  compose.dupper = k.dupper;
  compose.dlog_s = k.dlog_s;
  lu_compose_backward(compose, on);
}

}  // namespace

void lu_linear_forward(const LULinearForward& k, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, on) : forward<float>(k, on);
}

void lu_linear_backward(const LULinearBackward& k, const Launch& on) {
  k.data == DType::f64 ? backward<double>(k, on) : backward<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
