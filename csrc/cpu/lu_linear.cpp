// The LU-factored linear map on the CPU: two triangles swept over tiles of columns (triangle_sweep.h), as products or
// as solves, transposed for the gradient.
//
// All positions of all samples are columns. A tile is packed to [rows, kTile] from any layout and type, with the
// permutation on its way in or out, swept a group of columns at a time, and unpacked. Column chunks are cut by shape
// alone and summed in order, so results do not depend on the thread count. Tables of enough rows need no tile for a
// product: it is made of their rows and the dense matrix, and so is their part of the gradient.

#include "../include/triangle_sweep.h"
#include "lu_rows.h"
#include "lu_tile.h"
#include "processor.h"

namespace nf {
namespace NF_ISA {

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
      straight.data[lu.columns ? lu.columns[i] : i] = i;
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

// W itself, or its transpose, from factors made for products.
template <typename T>
void compose(const Factors<T>& f, bool turned, T* to) {
  const int64_t n = f.channels;
  Buffer<T> tile(f.size * pitch<T>());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j) tile.data[i * pitch<T>() + j] = f.matrix.data[j * f.size + i];
  Triangles<T> unit = f.triangles;
  unit.shift = nullptr;
  for (int column = 0; column < padded<T>(static_cast<int>(n)); column += group<T>())
    sweep<kRows, true, false>(Group<T>{tile.data + column}, unit);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      to[turned ? j * n + i : i * n + j] = tile.data[f.place.data[i] * pitch<T>() + f.straight.data[j]];
}

// Columns, in channels, that are worth composing W for.
constexpr int64_t kWorthComposing = 4;

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardJob {
  const LULinearForward& k;
  const Factors<T>& factors;
  Plan plan;
  const T* weight;  // W^T, where the data lies in rows and there is enough of it; or null

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<ForwardJob*>(self);
    const LULinearForward& k = job.k;
    const Factors<T>& f = job.factors;
    const RowPacking<T> packing = row_packing_for<T>(k.data);
    Buffer<T> tile(job.weight ? 0 : f.size * pitch<T>());
    for (int64_t i = begin; i < end; ++i) {
      int64_t n0;
      int count;
      job.plan.tile(i, k.positions, &n0, &count);
      if (job.weight) {
        multiply_rows_by(static_cast<const T*>(k.x.data) + n0 * k.x.p, k.x.p, job.weight, static_cast<const T*>(k.bias),
                         count, f.channels, static_cast<T*>(k.y.data) + n0 * k.y.p, k.y.p);
        continue;
      }
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
  ForwardJob<T> job{k, factors, Plan::make<T>(DType::bf16, k.batch, k.positions, nullptr, 0), nullptr};
  if (job.plan.tiles == 0) return;
  const int64_t channels = factors.channels;
  const bool dense = !k.inverse && lies_in_rows<T>(k.x, k.data, k.batch, channels) && channels <= kTile &&
                     lies_in_rows<T>(k.y, k.data, k.batch, channels) && k.positions >= kWorthComposing * channels;
  Buffer<T> weight(dense ? channels * channels : 0);
  if (dense) {
    compose(factors, true, weight.data);
    job.weight = weight.data;
  }
  const int64_t work = job.plan.columns * channels * (channels + 8);
  on.parallel(job.plan.tiles, job.plan.grain(job.plan.tiles, work), &job, ForwardJob<T>::body);
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardJob {
  const LULinearBackward& k;
  const Factors<T>& factors;
  Plan plan;
  bool rows;        // the sums are made of rows in memory
  bool dense;       // and dx is
  const T* weight;  // W, where dense
  T* dweight;       // [chunks, channels, channels]: of the matrix without its permutation, from rows with it
  T* dbias;         // [chunks, channels]: likewise

  void chunk(int64_t i, T* grad, T* x, MixSums<T>& sums) const {
    const Factors<T>& f = factors;
    const RowPacking<T> packing = row_packing_for<T>(k.data);
    sums.clear();
    for (int64_t j = plan.tiles * i / plan.chunks; j < plan.tiles * (i + 1) / plan.chunks; ++j) {
      int64_t n0;
      int count;
      plan.tile(j, k.positions, &n0, &count);
      const auto add_rows = [&](const View& side) {
        const T* from = static_cast<const T*>(side.data) + n0 * side.p;
        if (dweight)
          add_outer_of_rows(from, side.p, static_cast<const T*>(k.x.data) + n0 * k.x.p, k.x.p, count, f.channels,
                            dweight + i * f.channels * f.channels);
        if (dbias) add_sums_of_rows(from, side.p, count, f.channels, dbias + i * f.channels);
      };
      if (dense) {
        const T* dy = static_cast<const T*>(k.dy.data) + n0 * k.dy.p;
        if (k.dx.data)
          multiply_rows_by(dy, k.dy.p, weight, static_cast<const T*>(nullptr), count, f.channels,
                           static_cast<T*>(k.dx.data) + n0 * k.dx.p, k.dx.p);
        add_rows(k.dy);
        continue;
      }
      const int whole = padded<T>(count);
      packing.pack(k.dy, f.channels, k.positions, n0, n0 + count, f.in(), f.size, grad);
      // The sums take the gradient where it stands before the permutation: what a product begins with, or a solve
      // ends with.
      if (f.solve) f.sweep_tile(grad, whole);
      if (dweight && !rows) {
        packing.pack(k.x, f.channels, k.positions, n0, n0 + count, f.straight.data, f.size, x);
        sums.add_products(grad, pitch<T>(), x, pitch<T>(), whole);
      }
      if (dbias && !rows) sums.add_sums(grad, pitch<T>(), whole);
      if (!f.solve && k.dx.data) f.sweep_tile(grad, whole);
      if (k.dx.data) packing.unpack(k.dx, f.channels, k.positions, n0, n0 + count, f.out(), grad);
      if (rows) add_rows(f.solve ? k.dx : k.dy);
    }
    if (dweight && !rows) sums.write_products(dweight + i * f.channels * f.channels);
    if (dbias && !rows) sums.write_sums(dbias + i * f.channels);
  }

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<BackwardJob*>(self);
    const int64_t tile = job.factors.size * pitch<T>();
    Buffer<T> grad(tile), x(job.dweight && !job.rows ? tile : 0);
    MixSums<T> sums(job.rows ? 0 : job.factors.channels);
    for (int64_t i = begin; i < end; ++i) job.chunk(i, grad.data, x.data, sums);
  }
};

// dL = tril(G U^T), dU = triu(L^T G) and the diagonal's from G = P^T dW, whose element [place[i], straight[j]] is [i,
// j] of `dweight` (or [i, j] itself without these), times `sign`: products with triangles again, of G's columns and of
// its rows.
template <typename T>
void factor_gradients(const LULinearBackward& k, const T* dweight, const Factors<T>* order, T sign) {
  const int64_t n = k.lu.channels;
  const Factors<T> straight(k.lu, nullptr, false, false), transposed(k.lu, nullptr, true, false);
  Buffer<T> below(straight.size * pitch<T>()), above(straight.size * pitch<T>());
  Buffer<int64_t> place(n), column(n);  // the second turned around: where column j of G is in dweight
  for (int64_t i = 0; i < n; ++i) {
    place.data[i] = order ? order->place.data[i] : i;
    column.data[order ? order->straight.data[i] : i] = i;
  }
  auto *dlower = static_cast<T*>(k.dlower), *dupper = static_cast<T*>(k.dupper), *dlog_s = static_cast<T*>(k.dlog_s);
  for (int64_t n0 = 0; n0 < n; n0 += kTile) {
    const int64_t n1 = n0 + kTile < n ? n0 + kTile : n;
    for (int64_t i = 0; i < n; ++i) {
      const T* row = dweight + i * n;
      const int64_t at = place.data[i];
      for (int64_t j = n0; j < n1; ++j) above.data[at * pitch<T>() + j - n0] = sign * row[column.data[j]];
      if (at >= n0 && at < n1)
        for (int64_t j = 0; j < n; ++j) below.data[j * pitch<T>() + at - n0] = sign * row[column.data[j]];
    }
    const int whole = padded<T>(static_cast<int>(n1 - n0));
    for (int column = 0; column < whole; column += group<T>()) {
      sweep<kRows, false, false>(Group<T>{above.data + column}, transposed.triangles);
      sweep<kRows, false, false>(Group<T>{below.data + column}, straight.triangles);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = n0; j < n1; ++j) dupper[i * n + j] = j > i ? above.data[i * pitch<T>() + j - n0] : T(0);
    for (int64_t i = n0; i < n1; ++i) {
      for (int64_t j = 0; j < n; ++j) dlower[i * n + j] = j < i ? below.data[j * pitch<T>() + i - n0] : T(0);
      const double raw = static_cast<const T*>(k.lu.log_s)[i];
      const double s = straight.matrix.data[i * (straight.size + 1)];
      dlog_s[i] = static_cast<T>(above.data[i * pitch<T>() + i - n0] * diagonal_slope(k.lu.diagonal, raw, s));
    }
  }
}

template <typename T>
void backward(LULinearBackward k, const Launch& on) {
  View* views[] = {&k.dy, &k.x, k.dx.data ? &k.dx : &k.x};
  join_samples(k.batch, k.positions, views, k.dx.data ? 3 : 2);
  const int64_t channels = k.lu.channels, square = channels * channels;
  const Factors<T> factors(k.lu, nullptr, true, k.inverse);
  const View& side = k.inverse ? k.dx : k.dy;
  const bool rows =
      side.data && lies_in_rows<T>(side, k.data, k.batch, channels) && lies_in_rows<T>(k.x, k.data, k.batch, channels);
  const bool dense = rows && !k.inverse && channels <= kTile && k.positions >= kWorthComposing * channels &&
                     (!k.dx.data || lies_in_rows<T>(k.dx, k.data, k.batch, channels));
  Buffer<T> weight(dense && k.dx.data ? square : 0);
  if (dense && k.dx.data) compose(Factors<T>(k.lu, nullptr, false, false), false, weight.data);
  BackwardJob<T> job{k,       factors, Plan::make<T>(DType::bf16, k.batch, k.positions, nullptr, 0),
                     rows,    dense,   weight.data,
                     nullptr, nullptr};
  // From rows there are no sums by lanes to add up: more chunks cost little, and more threads share them.
  if (rows) job.plan.chunks = job.plan.tiles < kChunks ? (job.plan.tiles + 1) / 2 : kChunks / 2;
  const int64_t chunks = job.plan.chunks;
  Buffer<T> dweight(k.dlower ? chunks * square : 0), dbias(k.dbias ? chunks * channels : 0);
  job.dweight = k.dlower ? dweight.data : nullptr;
  job.dbias = k.dbias ? dbias.data : nullptr;
  const int64_t work = job.plan.columns * channels * (2 * channels + 8);
  if (chunks) on.parallel(chunks, job.plan.grain(chunks, work), &job, BackwardJob<T>::body);
  const T side_of = k.inverse ? T(-1) : T(1);  // inverted, -dx stands where dy does
  if (k.dbias) {
    Buffer<T> sums(channels);
    add_partials(dbias.data, chunks, channels, sums.data);
    for (int64_t c = 0; c < channels; ++c)
      static_cast<T*>(k.dbias)[c] = side_of * sums.data[rows ? c : factors.place.data[c]];
  }
  if (!k.dlower) return;
  Buffer<T> sums(square);
  add_partials(dweight.data, chunks, square, sums.data);
  factor_gradients(k, sums.data, rows ? &factors : nullptr, side_of);
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
