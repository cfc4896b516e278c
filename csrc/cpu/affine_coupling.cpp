// Affine coupling on the CPU: forward (and inverse) with the log-determinant, backward from the output.
//
// Arithmetic happens in blocks of up to 256 elements at unit stride. Samples with rows long enough are walked row by
// row (runs): a tensor at unit stride in the arithmetic's type is used in place, any other (another layout, a narrower
// type) passes through scratch. Narrow tables go through it with several rows to a block. Masks, channel maps and
// samples too small for runs are gathered element by element (tiles). Work is cut into units (a sample, or a piece of a
// large one) by shape alone, so results do not depend on threads.

#include <cstdlib>
#include <new>

#include "affine_coupling_rows.h"
#include "convert.h"
#include "isa.h"
#include "processor.h"

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
    const View* views[] = {&io.x, &io.y};
    const View* raw[] = {&io.params};
    runs = find_runs(coupling, views, 2, raw, 1);
    compute = block_function<T, false>(coupling);
  }

  void by_runs(int64_t begin, int64_t end) {
    const Coupling& k = this->k;
    Scratch<T> s;
    s.quiet();
    const Port<T> x(io.x, k.data, runs), y(io.y, k.data, runs), params(io.params, k.raw, runs, k.params_step());
    const int64_t shift = k.shift_offset(io.params.c) * params.width, raw = k.scale_offset(io.params.c) * params.width;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = this->sample_of(u), piece = u - b * this->pieces;
      copy_passing<T>(k, runs, x, y, b, piece, this->pieces);
      const Part part = part_of(runs.rows, runs.length, piece, this->pieces);
      double total = 0;
      for (int64_t row = part.row0; row < part.row1; ++row) {
        char *from = x.start(b, k.first, row), *to = y.start(b, k.first, row), *given = params.start(b, 0, row);
        if (k.gain) set_gain(k, row, kBlock, s);
        T lanes[kLane] = {};
        for (int64_t i = part.begin; i < part.end;) {
          const int n = block_size(part.end - i);
          Block<T> block = s.block();
          block.x = x.read(from, i, n, s.x);
          block.t = params.read(given + shift, i, n, s.t);
          if (k.has_scale()) block.r = params.read(given + raw, i, n, s.r);
          block.y = y.target(to, i, n, s.y);
          compute(block, padded_size(n), this->constants, this->shift_factor);
          y.finish(to, i, n, block.y);
          add_lanes(s.log_s, n, lanes);
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
    if (is_narrow_table(job->k)) return forward_rows(*job, job->io, job->compute, job->partial, begin, end);
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
    compute(s.block(), pad(s, tile.n), this->constants, this->shift_factor);
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
void forward(const Coupling& k, const CouplingForward& io, const Launch& on) {
  ForwardJob<T> job(k, io);
  const int64_t elements = k.channels * k.positions;
  if (is_narrow_table(k)) {
    job.cut(elements, 1);
  } else if (job.runs.possible) {
    job.cut(elements, job.runs.rows == 1 ? job.runs.length / kLane : job.runs.rows);
  } else {
    job.cut(elements, outer_size(k, io.x));
  }
  job.partial = static_cast<double*>(std::malloc((job.units + 1) * sizeof(double)));
  if (!job.partial) throw std::bad_alloc();
  if (job.units) on.parallel(job.units, job.grain(elements), &job, ForwardJob<T>::body);
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
  BlockFunction<T> compute, rebuild;  // rebuild: the coupling's input from the block that was just read
  double* gain_partial = nullptr;     // [units, transformed] or null

  BackwardJob(const Coupling& coupling, const CouplingBackward& tensors) : Common<T>(coupling), io(tensors) {
    const View* views[4] = {&io.y, &io.dx};
    const View* raw[] = {&io.params, &io.dparams};
    int n = 2;
    if (io.dy.data) views[n++] = &io.dy;
    if (io.x.data) views[n++] = &io.x;
    runs = find_runs(coupling, views, n, raw, 2);
    compute = block_function<T, true>(coupling);
    rebuild = block_function<T, false>(inverted(coupling));
  }

  T dlogdet(int64_t b) const { return io.dlogdet ? static_cast<const T*>(io.dlogdet)[b * io.dlogdet_stride] : T(0); }

  void by_runs(int64_t begin, int64_t end) {
    const Coupling& k = this->k;
    Scratch<T> s;
    s.quiet();
    const Port<T> y(io.y, k.data, runs), dy(io.dy, k.data, runs), dx(io.dx, k.data, runs), x(io.x, k.data, runs);
    const Port<T> params(io.params, k.raw, runs, k.params_step()), dparams(io.dparams, k.raw, runs, k.params_step());
    const int64_t width = params.width;
    const int64_t shift = k.shift_offset(io.params.c) * width, raw = k.scale_offset(io.params.c) * width;
    const int64_t dshift = k.shift_offset(io.dparams.c) * width, draw = k.scale_offset(io.dparams.c) * width;
    const int longest = static_cast<int>(runs.length < kBlock ? (runs.length + kLane - 1) / kLane * kLane : kBlock);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = this->sample_of(u), piece = u - b * this->pieces;
      copy_passing<T>(k, runs, dy, dx, b, piece, this->pieces);
      if (x.data) copy_passing<T>(k, runs, y, x, b, piece, this->pieces);
      fill(s.dlogdet, longest, dlogdet(b));
      const Part part = part_of(runs.rows, runs.length, piece, this->pieces);
      for (int64_t row = part.row0; row < part.row1; ++row) {
        char *from = y.start(b, k.first, row), *to = dx.start(b, k.first, row);
        char* grad = dy.data ? dy.start(b, k.first, row) : nullptr;
        char *given = params.start(b, 0, row), *made = dparams.start(b, 0, row);
        if (k.gain) set_gain(k, row, longest, s);
        T lanes[kLane] = {};
        for (int64_t i = part.begin; i < part.end;) {
          const int n = block_size(part.end - i);
          Block<T> block = s.block();
          block.x = y.read(from, i, n, s.x);
          if (grad) block.dy = dy.read(grad, i, n, s.dy);
          block.t = params.read(given + shift, i, n, s.t);
          block.dx = dx.target(to, i, n, s.dx);
          block.dt = dparams.target(made + dshift, i, n, s.dt);
          if (k.has_scale()) {
            block.r = params.read(given + raw, i, n, s.r);
            block.dr = dparams.target(made + draw, i, n, s.dr);
          }
          compute(block, padded_size(n), this->constants, this->shift_factor);
          dx.finish(to, i, n, block.dx);
          dparams.finish(made + dshift, i, n, block.dt);
          if (k.has_scale()) dparams.finish(made + draw, i, n, block.dr);
          if (gain_partial) add_lanes(s.dg, n, lanes);
          if (x.data) {
            char* start = x.start(b, k.first, row);
            block.y = x.target(start, i, n, s.y);
            rebuild(block, padded_size(n), this->constants, -this->shift_factor);
            x.finish(start, i, n, block.y);
          }
          i += n;
        }
        if (gain_partial) gain_partial[u * k.transformed + row] += sum_lanes(lanes);
      }
    }
  }

  void by_tiles(int64_t begin, int64_t end);

  static void body(void* self, int64_t begin, int64_t end) {
    auto* job = static_cast<BackwardJob*>(self);
    if (is_narrow_table(job->k))
      return backward_rows(*job, job->io, job->compute, job->rebuild, job->gain_partial, begin, end);
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
    compute(s.block(), pad(s, tile.n), this->constants, this->shift_factor);
    store(io.dx.data, tile.x, tile.n, s.dx);
    store_raw(io.dparams.data, tile.dt, tile.n, s.dt);
    if (k.has_scale()) store_raw(io.dparams.data, tile.dr, tile.n, s.dr);
    if (gain_partial)
      for (int i = 0; i < tile.n; ++i) gain_partial[tile.unit[i] * k.transformed + tile.channel[i]] += s.dg[i];
    if (io.x.data) {
      rebuild(s.block(), pad(s, tile.n), this->constants, -this->shift_factor);
      store(io.x.data, tile.rebuilt, tile.n, s.y);
    }
    tile.n = 0;
  };
  visit(*this, io.y, begin, end, [&](int64_t u, int64_t b, int64_t c, int64_t p) {
    const int64_t j = k.source(c);
    const int64_t dxo = b * io.dx.b + c * io.dx.c + p * io.dx.p, dyo = b * io.dy.b + c * io.dy.c + p * io.dy.p;
    const int64_t dpo = b * io.dparams.b + j * step * io.dparams.c + p * io.dparams.p;
    const int64_t ro = b * io.x.b + c * io.x.c + p * io.x.p, yo = b * io.y.b + c * io.y.c + p * io.y.p;
    if (j < 0 || (mask && !mask[b * k.mask.b + c * k.mask.c + p * k.mask.p])) {
      T v = 0;
      if (io.dy.data) load(io.dy.data, &dyo, 1, &v);
      store(io.dx.data, &dxo, 1, &v);
      if (io.x.data) {
        load(io.y.data, &yo, 1, &v);
        store(io.x.data, &ro, 1, &v);
      }
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
    tile.x[i] = dxo, tile.y[i] = yo, tile.dy[i] = dyo, tile.rebuilt[i] = ro;
    tile.t[i] = po + t_off, tile.r[i] = po + r_off, tile.dt[i] = dpo + dt_off, tile.dr[i] = dpo + dr_off;
    tile.unit[i] = u, tile.channel[i] = j;
    if (tile.n == kBlock) flush();
  });
  if (tile.n) flush();
}

template <typename T>
void backward(const Coupling& k, const CouplingBackward& io, const Launch& on) {
  BackwardJob<T> job(k, io);
  const int64_t elements = k.channels * k.positions;
  if (is_narrow_table(k)) {
    job.cut(elements, 1);
  } else if (job.runs.possible) {
    job.cut(elements, job.runs.rows == 1 ? job.runs.length / kLane : job.runs.rows);
  } else {
    job.cut(elements, outer_size(k, io.y));
  }
  if (io.dgain) {
    job.gain_partial = static_cast<double*>(std::calloc(job.units * k.transformed + 1, sizeof(double)));
    if (!job.gain_partial) throw std::bad_alloc();
  }
  if (job.units) on.parallel(job.units, job.grain(elements), &job, BackwardJob<T>::body);
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

void affine_coupling_forward(const Coupling& k, const CouplingForward& io, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, io, on) : forward<float>(k, io, on);
}

void affine_coupling_backward(const Coupling& k, const CouplingBackward& io, const Launch& on) {
  k.data == DType::f64 ? backward<double>(k, io, on) : backward<float>(k, io, on);
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
