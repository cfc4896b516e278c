// Affine coupling on the CPU: forward (and inverse) with the log-determinant, backward from the output.
//
// Arithmetic happens in blocks of up to 256 elements at unit stride. Where memory already is at unit stride in the
// arithmetic's type, blocks point into it (runs); everything else (other strides, narrower types, masks, channel maps,
// gains, tiny samples) is gathered into scratch, computed by the same block function and scattered back (tiles).
// Work is cut into units (a sample, or a piece of a large one) by shape alone, so results do not depend on threads.

#include <cstdlib>

#include "affine_coupling_layout.h"
#include "convert.h"
#include "isa.h"
#include "kernels.h"

namespace nf {
namespace NF_ISA {
namespace {

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardJob : Common<T> {
  const CouplingForward& io;
  Runs runs;
  BlockFunction<T> compute;
  double* partial = nullptr;  // [units]

  ForwardJob(const Coupling& coupling, const CouplingForward& tensors) : Common<T>(coupling), io(tensors) {
    const View* data[] = {&io.x, &io.y};
    const View* raw[] = {&io.params};
    runs = find_runs(coupling, data, 2, raw, 1);
    compute = block_function<T, false>(coupling);
  }

  void by_runs(int64_t begin, int64_t end) {
    const Coupling& k = this->k;
    Scratch<T> s;
    fill(s.g, kBlock, T(1));
    fill(s.log_g, kBlock, T(0));
    fill(s.r, kBlock, T(0));
    const bool along_positions = runs.along_positions;
    const int64_t step = along_positions ? k.params_step() : 1;
    const int64_t t_off = k.shift_offset(io.params.c), r_off = k.scale_offset(io.params.c);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = this->sample_of(u), piece = u - b * this->pieces;
      copy_passing<T>(k, runs, io.x, io.y, b, piece, this->pieces);
      const Part part = part_of(runs.rows, runs.length, piece, this->pieces);
      double total = 0;
      for (int64_t row = part.row0; row < part.row1; ++row) {
        const int64_t c = along_positions ? row : 0, p = along_positions ? 0 : row;
        const T* x = at<T>(io.x, b, k.first + c, p);
        const T* params = at<T>(io.params, b, c * step, p);
        T* y = at<T>(io.y, b, k.first + c, p);
        T lanes[kLane] = {};
        for (int64_t i = part.begin; i < part.end;) {
          const int64_t left = part.end - i;
          Block<T> block = s.block();
          int n = static_cast<int>(left < kBlock ? left : kBlock);
          if (n >= kLane) {
            n &= ~(kLane - 1);
            block.x = x + i, block.t = params + t_off + i, block.y = y + i;
            if (k.has_scale()) block.r = params + r_off + i;
            compute(block, n, this->constants, this->shift_sign);
          } else {
            fill(s.x, kLane, T(0)), fill(s.t, kLane, T(0));
            std::memcpy(s.x, x + i, n * sizeof(T));
            std::memcpy(s.t, params + t_off + i, n * sizeof(T));
            if (k.has_scale()) {
              fill(s.y, kLane, T(0));
              std::memcpy(s.y, params + r_off + i, n * sizeof(T));
              block.r = s.y;  // read before it is written
            }
            block.y = s.dx;
            compute(block, kLane, this->constants, this->shift_sign);
            std::memcpy(y + i, s.dx, n * sizeof(T));
            fill(s.log_s + n, kLane - n, T(0));
          }
          for (int j = 0; j < n; j += kLane)
            for (int l = 0; l < kLane; ++l) lanes[l] += s.log_s[j + l];
          i += n;
        }
        total += sum_lanes(lanes);
      }
      partial[u] = total;
    }
  }

  void by_tiles(int64_t begin, int64_t end);

  static void body(void* self, int64_t begin, int64_t end) {
    auto* job = static_cast<ForwardJob*>(self);
    job->runs.possible ? job->by_runs(begin, end) : job->by_tiles(begin, end);
  }
};

template <typename T>
void ForwardJob<T>::by_tiles(int64_t begin, int64_t end) {
  const Coupling& k = this->k;
  const Gather<T> load = gather_for<T>(k.data), load_raw = gather_for<T>(k.raw);
  const Scatter<T> store = scatter_for<T>(k.data);
  const int64_t width = size_of(k.data), step = k.params_step();
  const int64_t t_off = k.shift_offset(io.params.c), r_off = k.scale_offset(io.params.c);
  const auto* mask = static_cast<const bool*>(k.mask.data);
  const auto* from = static_cast<const char*>(io.x.data);
  auto* to = static_cast<char*>(io.y.data);
  Scratch<T> s;
  fill(s.r, kBlock, T(0));
  Tile tile;
  for (int64_t u = begin; u < end; ++u) partial[u] = 0;
  const auto flush = [&] {
    load(io.x.data, tile.x, tile.n, s.x);
    load_raw(io.params.data, tile.t, tile.n, s.t);
    if (k.has_scale()) load_raw(io.params.data, tile.r, tile.n, s.r);
    load_gain(k, tile, s);
    compute(s.block(), pad(s, tile.n), this->constants, this->shift_sign);
    store(io.y.data, tile.y, tile.n, s.y);
    for (int i = 0; i < tile.n; ++i) partial[tile.unit[i]] += s.log_s[i];
    tile.n = 0;
  };
  visit(*this, io.x, begin, end, [&](int64_t u, int64_t b, int64_t c, int64_t p) {
    const int64_t j = k.source(c);
    const int64_t xo = b * io.x.b + c * io.x.c + p * io.x.p, yo = b * io.y.b + c * io.y.c + p * io.y.p;
    if (j < 0 || (mask && !mask[b * k.mask.b + c * k.mask.c + p * k.mask.p])) {
      std::memcpy(to + yo * width, from + xo * width, width);
      return;
    }
    const int64_t po = b * io.params.b + j * step * io.params.c + p * io.params.p;
    const int i = tile.n++;
    tile.x[i] = xo, tile.y[i] = yo, tile.t[i] = po + t_off, tile.r[i] = po + r_off;
    tile.unit[i] = u, tile.channel[i] = j;
    if (tile.n == kBlock) flush();
  });
  if (tile.n) flush();
}

template <typename T>
void forward(const Coupling& k, const CouplingForward& io, Parallel parallel) {
  ForwardJob<T> job(k, io);
  const int64_t elements = k.channels * k.positions;
  if (job.runs.possible) {
    job.cut(elements, job.runs.rows == 1 ? job.runs.length / kLane : job.runs.rows);
  } else {
    job.cut(elements, outer_size(k, io.x));
  }
  job.partial = static_cast<double*>(std::malloc((job.units + 1) * sizeof(double)));
  if (job.units) parallel(job.units, job.grain(elements), &job, ForwardJob<T>::body);
  T* out = static_cast<T*>(io.logdet);
  const T* in = static_cast<const T*>(io.logdet_in);
  for (int64_t b = 0; b < k.batch; ++b) {
    double total = 0;
    for (int64_t i = 0; i < job.pieces; ++i) total += job.partial[b * job.pieces + i];
    out[b] = static_cast<T>(in ? total + in[b * io.logdet_in_stride] : total);
  }
  std::free(job.partial);
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardJob : Common<T> {
  const CouplingBackward& io;
  Runs runs;
  BlockFunction<T> compute;
  double* gain_partial = nullptr;  // [units, transformed] or null

  BackwardJob(const Coupling& coupling, const CouplingBackward& tensors) : Common<T>(coupling), io(tensors) {
    const View* data[] = {&io.y, &io.dx, &io.dy};
    const View* raw[] = {&io.params, &io.dparams};
    runs = find_runs(coupling, data, io.dy.data ? 3 : 2, raw, 2);
    compute = block_function<T, true>(coupling);
  }

  T dlogdet(int64_t b) const { return io.dlogdet ? static_cast<const T*>(io.dlogdet)[b * io.dlogdet_stride] : T(0); }

  void by_runs(int64_t begin, int64_t end) {
    const Coupling& k = this->k;
    Scratch<T> s, zero;
    fill(s.g, kBlock, T(1));
    fill(s.log_g, kBlock, T(0));
    fill(zero.dy, kBlock, T(0));
    fill(zero.r, kBlock, T(0));
    const bool along_positions = runs.along_positions;
    const int64_t step = along_positions ? k.params_step() : 1;
    const int64_t t_off = k.shift_offset(io.params.c), r_off = k.scale_offset(io.params.c);
    const int64_t dt_off = k.shift_offset(io.dparams.c), dr_off = k.scale_offset(io.dparams.c);
    const int run_block = static_cast<int>(runs.length < kBlock ? (runs.length + kLane - 1) / kLane * kLane : kBlock);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = this->sample_of(u), piece = u - b * this->pieces;
      copy_passing<T>(k, runs, io.dy, io.dx, b, piece, this->pieces);
      fill(s.dlogdet, run_block, dlogdet(b));
      const Part part = part_of(runs.rows, runs.length, piece, this->pieces);
      for (int64_t row = part.row0; row < part.row1; ++row) {
        const int64_t c = along_positions ? row : 0, p = along_positions ? 0 : row;
        const T* y = at<T>(io.y, b, k.first + c, p);
        const T* dy = io.dy.data ? at<T>(io.dy, b, k.first + c, p) : nullptr;
        const T* params = at<T>(io.params, b, c * step, p);
        T* dx = at<T>(io.dx, b, k.first + c, p);
        T* dparams = at<T>(io.dparams, b, c * step, p);
        for (int64_t i = part.begin; i < part.end;) {
          const int64_t left = part.end - i;
          int n = static_cast<int>(left < kBlock ? left : kBlock);
          Block<T> block = s.block();
          const bool whole = n >= kLane;
          if (whole) {
            n &= ~(kLane - 1);
            block.x = y + i, block.t = params + t_off + i, block.dx = dx + i, block.dt = dparams + dt_off + i;
            block.dy = dy ? dy + i : zero.dy;
            block.r = zero.r;
            if (k.has_scale()) block.r = params + r_off + i, block.dr = dparams + dr_off + i;
          } else {
            fill(s.x, kLane, T(0)), fill(s.t, kLane, T(0)), fill(s.r, kLane, T(0)), fill(s.dy, kLane, T(0));
            std::memcpy(s.x, y + i, n * sizeof(T));
            std::memcpy(s.t, params + t_off + i, n * sizeof(T));
            if (k.has_scale()) std::memcpy(s.r, params + r_off + i, n * sizeof(T));
            if (dy) std::memcpy(s.dy, dy + i, n * sizeof(T));
          }
          compute(block, whole ? n : kLane, this->constants, this->shift_sign);
          if (!whole) {
            std::memcpy(dx + i, s.dx, n * sizeof(T));
            std::memcpy(dparams + dt_off + i, s.dt, n * sizeof(T));
            if (k.has_scale()) std::memcpy(dparams + dr_off + i, s.dr, n * sizeof(T));
          }
          i += n;
        }
      }
    }
  }

  void by_tiles(int64_t begin, int64_t end);

  static void body(void* self, int64_t begin, int64_t end) {
    auto* job = static_cast<BackwardJob*>(self);
    job->runs.possible ? job->by_runs(begin, end) : job->by_tiles(begin, end);
  }
};

template <typename T>
void BackwardJob<T>::by_tiles(int64_t begin, int64_t end) {
  const Coupling& k = this->k;
  const Gather<T> load = gather_for<T>(k.data), load_raw = gather_for<T>(k.raw);
  const Scatter<T> store = scatter_for<T>(k.data), store_raw = scatter_for<T>(k.raw);
  const int64_t step = k.params_step();
  const int64_t t_off = k.shift_offset(io.params.c), r_off = k.scale_offset(io.params.c);
  const int64_t dt_off = k.shift_offset(io.dparams.c), dr_off = k.scale_offset(io.dparams.c);
  const auto* mask = static_cast<const bool*>(k.mask.data);
  Scratch<T> s;
  fill(s.r, kBlock, T(0));
  fill(s.dy, kBlock, T(0));
  Tile tile;
  const auto flush = [&] {
    load(io.y.data, tile.y, tile.n, s.x);
    if (io.dy.data) load(io.dy.data, tile.dy, tile.n, s.dy);
    load_raw(io.params.data, tile.t, tile.n, s.t);
    if (k.has_scale()) load_raw(io.params.data, tile.r, tile.n, s.r);
    load_gain(k, tile, s);
    for (int i = 0; i < tile.n; ++i) s.dlogdet[i] = dlogdet(tile.unit[i] / this->pieces);
    compute(s.block(), pad(s, tile.n), this->constants, this->shift_sign);
    store(io.dx.data, tile.x, tile.n, s.dx);
    store_raw(io.dparams.data, tile.dt, tile.n, s.dt);
    if (k.has_scale()) store_raw(io.dparams.data, tile.dr, tile.n, s.dr);
    if (gain_partial)
      for (int i = 0; i < tile.n; ++i) gain_partial[tile.unit[i] * k.transformed + tile.channel[i]] += s.dg[i];
    tile.n = 0;
  };
  visit(*this, io.y, begin, end, [&](int64_t u, int64_t b, int64_t c, int64_t p) {
    const int64_t j = k.source(c);
    const int64_t dxo = b * io.dx.b + c * io.dx.c + p * io.dx.p, dyo = b * io.dy.b + c * io.dy.c + p * io.dy.p;
    const int64_t dpo = b * io.dparams.b + j * step * io.dparams.c + p * io.dparams.p;
    if (j < 0 || (mask && !mask[b * k.mask.b + c * k.mask.c + p * k.mask.p])) {
      T v = 0;
      if (io.dy.data) load(io.dy.data, &dyo, 1, &v);
      store(io.dx.data, &dxo, 1, &v);
      if (j >= 0) {
        const T none = 0;
        const int64_t dt = dpo + dt_off, dr = dpo + dr_off;
        store_raw(io.dparams.data, &dt, 1, &none);
        if (k.has_scale()) store_raw(io.dparams.data, &dr, 1, &none);
      }
      return;
    }
    const int64_t po = b * io.params.b + j * step * io.params.c + p * io.params.p;
    const int i = tile.n++;
    tile.x[i] = dxo, tile.y[i] = b * io.y.b + c * io.y.c + p * io.y.p, tile.dy[i] = dyo;
    tile.t[i] = po + t_off, tile.r[i] = po + r_off, tile.dt[i] = dpo + dt_off, tile.dr[i] = dpo + dr_off;
    tile.unit[i] = u, tile.channel[i] = j;
    if (tile.n == kBlock) flush();
  });
  if (tile.n) flush();
}

template <typename T>
void backward(const Coupling& k, const CouplingBackward& io, Parallel parallel) {
  BackwardJob<T> job(k, io);
  const int64_t elements = k.channels * k.positions;
  if (job.runs.possible) {
    job.cut(elements, job.runs.rows == 1 ? job.runs.length / kLane : job.runs.rows);
  } else {
    job.cut(elements, outer_size(k, io.y));
  }
  if (io.dgain) job.gain_partial = static_cast<double*>(std::calloc(job.units * k.transformed + 1, sizeof(double)));
  if (job.units) parallel(job.units, job.grain(elements), &job, BackwardJob<T>::body);
  if (io.dgain) {
    for (int64_t j = 0; j < k.transformed; ++j) {
      double total = 0;
      for (int64_t u = 0; u < job.units; ++u) total += job.gain_partial[u * k.transformed + j];
      static_cast<T*>(io.dgain)[j] = static_cast<T>(total);
    }
    std::free(job.gain_partial);
  }
}

}  // namespace

void affine_coupling_forward(const Coupling& k, const CouplingForward& io, Parallel parallel) {
  k.data == DType::f64 ? forward<double>(k, io, parallel) : forward<float>(k, io, parallel);
}

void affine_coupling_backward(const Coupling& k, const CouplingBackward& io, Parallel parallel) {
  k.data == DType::f64 ? backward<double>(k, io, parallel) : backward<float>(k, io, parallel);
}

void elementary(int which, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    switch (which) {
      case 0:
        y[i] = exp_(x[i]);
        break;
      case 1:
        y[i] = log_(x[i]);
        break;
      case 2:
        y[i] = log1p_unit(x[i]);
        break;
      case 3:
        y[i] = tanh_(x[i]);
        break;
      default:
        y[i] = atan_(x[i]);
        break;
    }
  }
}

}  // namespace NF_ISA
}  // namespace nf
