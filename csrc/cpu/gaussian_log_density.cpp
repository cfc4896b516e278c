// Gaussian log-density on the CPU: the sum of each sample, and its gradients from x and params.
//
// To memory this is an affine coupling that transforms every channel: units, runs and tiles are the coupling's
// (affine_coupling_layout.h), so results do not depend on threads.

#include "../include/gaussian_log_density.h"

#include <cstdlib>
#include <new>

#include "affine_coupling_layout.h"
#include "convert.h"
#include "isa.h"
#include "processor.h"

namespace nf {
namespace NF_ISA {
namespace {

// Shift and scale are mean and log-scale; without params nothing has a scale.
Coupling as_coupling(const Gaussian& g) {
  Coupling k{};
  k.kind = g.learned ? MapKind::exp : MapKind::additive;
  k.interleaved = g.interleaved;
  k.scale_leads = g.scale_leads;
  k.data = g.data;
  k.raw = g.raw;
  k.batch = g.batch;
  k.channels = k.transformed = g.channels;
  k.positions = g.positions;
  return k;
}

// Minus twice the log-density of each element but for its constant: y from x, t (means) and r (log-scales).
template <typename T, bool learned>
void forward_block(const Block<T>& k, int n) {
  n &= ~(kLane - 1);
  const T* __restrict x = k.x, * __restrict t = k.t, * __restrict r = k.r;
  T* __restrict y = k.y;
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    if constexpr (learned) {
      const T eps = (x[i] - t[i]) * exp_(-r[i]);
      y[i] = eps * eps + T(2) * r[i];
    } else {
      y[i] = x[i] * x[i];
    }
  }
}

// dlogdet holds the sample's gradient.
template <typename T, bool learned>
void backward_block(const Block<T>& k, int n) {
  n &= ~(kLane - 1);
  const T* __restrict x = k.x, * __restrict t = k.t, * __restrict r = k.r, * __restrict d = k.dlogdet;
  T* __restrict dx = k.dx, * __restrict dt = k.dt, * __restrict dr = k.dr;
  NF_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    if constexpr (learned) {
      const T precision = exp_(-r[i]);
      const T eps = (x[i] - t[i]) * precision;
      const T dmean = d[i] * (eps * precision);
      dx[i] = -dmean;
      dt[i] = dmean;
      dr[i] = d[i] * (eps * eps - T(1));
    } else {
      dx[i] = -d[i] * x[i];
    }
  }
}

template <typename T>
using Compute = void (*)(const Block<T>&, int);

// The standard normal on n elements in a row, few as they may be.
template <typename T>
double sum_of_squares(const T* __restrict x, int64_t n) {
  T lanes[kLane] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kLane <= n; i += kLane)
    for (int l = 0; l < kLane; ++l) lanes[l] += x[i + l] * x[i + l];
  for (; i < n; ++i) rest += x[i] * x[i];
  return n < kLane ? rest : sum_lanes(lanes) + rest;
}

template <typename T>
void scale_by(const T* __restrict x, int64_t n, T factor, T* __restrict dx) {
  for (int64_t i = 0; i < n; ++i) dx[i] = factor * x[i];
}

// Whether a sample's elements lie end to end, positions or channels innermost.
bool is_flat(const Coupling& k, const View& v, bool along_positions) {
  const int64_t inner = along_positions ? k.positions : k.channels, outer = along_positions ? k.channels : k.positions;
  const int64_t element = along_positions ? v.p : v.c, row = along_positions ? v.c : v.p;
  return (inner == 1 || element == 1) && (outer == 1 || row == inner);
}

// What both directions share: the cut into units, and the walk over them: flat, by runs or by tiles.
template <typename T>
struct Job : Common<T> {
  bool flat = false;  // the standard normal on samples that lie end to end in the arithmetic's type
  Runs runs;

  explicit Job(const Coupling& coupling) : Common<T>(coupling) {}

  void plan(const View& x, const View* const* views, int n_views, const View* const* raw, int n_raw) {
    const Coupling& k = this->k;
    const int64_t elements = k.channels * k.positions;
    for (int along = 0; along < 2; ++along) {
      bool all = !k.has_scale() && k.data == (sizeof(T) == 8 ? DType::f64 : DType::f32);
      for (int i = 0; i < n_views; ++i) all = all && is_flat(k, *views[i], along);
      flat = flat || all;
    }
    if (!flat) runs = find_runs(k, views, n_views, raw, k.has_scale() ? n_raw : 0);
    const int64_t limit = flat             ? elements / kLane
                          : !runs.possible ? outer_size(k, x)
                          : runs.rows == 1 ? runs.length / kLane
                                           : runs.rows;
    this->cut(elements, limit);
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardJob : Job<T> {
  const GaussianForward& io;
  Compute<T> compute;
  double* partial = nullptr;  // [units]

  ForwardJob(const Coupling& coupling, const GaussianForward& tensors)
      : Job<T>(coupling),
        io(tensors),
        compute(coupling.has_scale() ? forward_block<T, true> : forward_block<T, false>) {
    const View* views[] = {&io.x};
    const View* raw[] = {&io.params};
    this->plan(io.x, views, 1, raw, 1);
  }

  void by_flat(int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(io.x.data);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = this->sample_of(u);
      const Part part = part_of(1, this->k.channels * this->k.positions, u - b * this->pieces, this->pieces);
      partial[u] = sum_of_squares(x + b * io.x.b + part.begin, part.end - part.begin);
    }
  }

  void by_runs(int64_t begin, int64_t end) {
    const Coupling& k = this->k;
    const Runs& runs = this->runs;
    Scratch<T> s;
    s.quiet();
    const Port<T> x(io.x, k.data, runs), params(io.params, k.raw, runs, k.params_step());
    const int64_t mean = k.shift_offset(io.params.c) * params.width, scale = k.scale_offset(io.params.c) * params.width;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = this->sample_of(u);
      const Part part = part_of(runs.rows, runs.length, u - b * this->pieces, this->pieces);
      double total = 0;
      for (int64_t row = part.row0; row < part.row1; ++row) {
        const char* from = x.start(b, 0, row);
        const char* given = k.has_scale() ? params.start(b, 0, row) : nullptr;
        T lanes[kLane] = {};
        for (int64_t i = part.begin; i < part.end;) {
          const int n = block_size(part.end - i);
          Block<T> block = s.block();
          block.x = x.read(from, i, n, s.x);
          if (given) {
            block.t = params.read(given + mean, i, n, s.t);
            block.r = params.read(given + scale, i, n, s.r);
          }
          compute(block, padded_size(n));
          add_lanes(s.y, n, lanes);
          i += n;
        }
        total += sum_lanes(lanes);
      }
      partial[u] = total;
    }
  }

  void by_tiles(int64_t begin, int64_t end) {
    const Coupling& k = this->k;
    const Gather<T> load = gather_for<T>(k.data), load_raw = gather_for<T>(k.raw);
    const int64_t step = k.params_step(), mean = k.shift_offset(io.params.c), scale = k.scale_offset(io.params.c);
    Scratch<T> s;
    Tile tile;
    for (int64_t u = begin; u < end; ++u) partial[u] = 0;
    const auto flush = [&] {
      load(io.x.data, tile.x, tile.n, s.x);
      if (k.has_scale()) {
        load_raw(io.params.data, tile.t, tile.n, s.t);
        load_raw(io.params.data, tile.r, tile.n, s.r);
      }
      compute(s.block(), pad(s, tile.n));
      for (int i = 0; i < tile.n; ++i) partial[tile.unit[i]] += s.y[i];
      tile.n = 0;
    };
    visit(*this, io.x, begin, end, [&](int64_t u, int64_t b, int64_t c, int64_t p) {
      const int64_t at = b * io.params.b + c * step * io.params.c + p * io.params.p;
      const int i = tile.n++;
      tile.x[i] = b * io.x.b + c * io.x.c + p * io.x.p;
      tile.t[i] = at + mean, tile.r[i] = at + scale, tile.unit[i] = u;
      if (tile.n == kBlock) flush();
    });
    if (tile.n) flush();
  }

  static void body(void* self, int64_t begin, int64_t end) {
    auto* job = static_cast<ForwardJob*>(self);
    job->flat ? job->by_flat(begin, end) : job->runs.possible ? job->by_runs(begin, end) : job->by_tiles(begin, end);
  }
};

template <typename T>
void forward(const Gaussian& g, const GaussianForward& io, const Launch& on) {
  const Coupling k = as_coupling(g);
  const int64_t elements = k.channels * k.positions;
  ForwardJob<T> job(k, io);
  job.partial = static_cast<double*>(std::malloc((job.units + 1) * sizeof(double)));
  if (!job.partial) throw std::bad_alloc();
  if (job.units) on.parallel(job.units, job.grain(elements), &job, ForwardJob<T>::body);
  T* out = static_cast<T*>(io.out);
  const T* in = static_cast<const T*>(io.logdet_in);
  for (int64_t b = 0; b < k.batch; ++b) {
    double total = 0;
    for (int64_t i = 0; i < job.pieces; ++i) total += job.partial[b * job.pieces + i];
    total = -0.5 * total - kHalfLog2Pi * static_cast<double>(elements);
    out[b] = static_cast<T>(in ? total + in[b * io.logdet_in_stride] : total);
  }
  std::free(job.partial);
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardJob : Job<T> {
  const GaussianBackward& io;
  Compute<T> compute;

  BackwardJob(const Coupling& coupling, const GaussianBackward& tensors)
      : Job<T>(coupling),
        io(tensors),
        compute(coupling.has_scale() ? backward_block<T, true> : backward_block<T, false>) {
    const View* views[] = {&io.x, &io.dx};
    const View* raw[] = {&io.params, &io.dparams};
    this->plan(io.x, views, io.dx.data ? 2 : 1, raw, io.dparams.data ? 2 : 1);
  }

  T dout(int64_t b) const { return static_cast<const T*>(io.dout)[b * io.dout_stride]; }

  void by_flat(int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(io.x.data);
    T* dx = static_cast<T*>(io.dx.data);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = this->sample_of(u);
      const Part part = part_of(1, this->k.channels * this->k.positions, u - b * this->pieces, this->pieces);
      scale_by(x + b * io.x.b + part.begin, part.end - part.begin, -dout(b), dx + b * io.dx.b + part.begin);
    }
  }

  void by_runs(int64_t begin, int64_t end) {
    const Coupling& k = this->k;
    const Runs& runs = this->runs;
    Scratch<T> s;
    s.quiet();
    const Port<T> x(io.x, k.data, runs), dx(io.dx, k.data, runs);
    const Port<T> params(io.params, k.raw, runs, k.params_step()), dparams(io.dparams, k.raw, runs, k.params_step());
    const int64_t width = params.width;
    const int64_t mean = k.shift_offset(io.params.c) * width, scale = k.scale_offset(io.params.c) * width;
    const int64_t dmean = k.shift_offset(io.dparams.c) * width, dscale = k.scale_offset(io.dparams.c) * width;
    const int longest = static_cast<int>(runs.length < kBlock ? (runs.length + kLane - 1) / kLane * kLane : kBlock);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t b = this->sample_of(u);
      fill(s.dlogdet, longest, dout(b));
      const Part part = part_of(runs.rows, runs.length, u - b * this->pieces, this->pieces);
      for (int64_t row = part.row0; row < part.row1; ++row) {
        const char* from = x.start(b, 0, row);
        const char* given = k.has_scale() ? params.start(b, 0, row) : nullptr;
        char* to = io.dx.data ? dx.start(b, 0, row) : nullptr;
        char* made = io.dparams.data ? dparams.start(b, 0, row) : nullptr;
        for (int64_t i = part.begin; i < part.end;) {
          const int n = block_size(part.end - i);
          Block<T> block = s.block();
          block.x = x.read(from, i, n, s.x);
          if (given) {
            block.t = params.read(given + mean, i, n, s.t);
            block.r = params.read(given + scale, i, n, s.r);
          }
          if (to) block.dx = dx.target(to, i, n, s.dx);
          if (made) {
            block.dt = dparams.target(made + dmean, i, n, s.dt);
            block.dr = dparams.target(made + dscale, i, n, s.dr);
          }
          compute(block, padded_size(n));
          if (to) dx.finish(to, i, n, block.dx);
          if (made) {
            dparams.finish(made + dmean, i, n, block.dt);
            dparams.finish(made + dscale, i, n, block.dr);
          }
          i += n;
        }
      }
    }
  }

  void by_tiles(int64_t begin, int64_t end) {
    const Coupling& k = this->k;
    const Gather<T> load = gather_for<T>(k.data), load_raw = gather_for<T>(k.raw);
    const Scatter<T> store = scatter_for<T>(k.data), store_raw = scatter_for<T>(k.raw);
    const int64_t step = k.params_step();
    const int64_t mean = k.shift_offset(io.params.c), scale = k.scale_offset(io.params.c);
    const int64_t dmean = k.shift_offset(io.dparams.c), dscale = k.scale_offset(io.dparams.c);
    Scratch<T> s;
    Tile tile;
    const auto flush = [&] {
      load(io.x.data, tile.x, tile.n, s.x);
      if (k.has_scale()) {
        load_raw(io.params.data, tile.t, tile.n, s.t);
        load_raw(io.params.data, tile.r, tile.n, s.r);
      }
      for (int i = 0; i < tile.n; ++i) s.dlogdet[i] = dout(tile.unit[i] / this->pieces);
      compute(s.block(), pad(s, tile.n));
      if (io.dx.data) store(io.dx.data, tile.y, tile.n, s.dx);
      if (io.dparams.data) {
        store_raw(io.dparams.data, tile.dt, tile.n, s.dt);
        store_raw(io.dparams.data, tile.dr, tile.n, s.dr);
      }
      tile.n = 0;
    };
    visit(*this, io.x, begin, end, [&](int64_t u, int64_t b, int64_t c, int64_t p) {
      const int64_t at = b * io.params.b + c * step * io.params.c + p * io.params.p;
      const int64_t to = b * io.dparams.b + c * step * io.dparams.c + p * io.dparams.p;
      const int i = tile.n++;
      tile.x[i] = b * io.x.b + c * io.x.c + p * io.x.p, tile.y[i] = b * io.dx.b + c * io.dx.c + p * io.dx.p;
      tile.t[i] = at + mean, tile.r[i] = at + scale, tile.dt[i] = to + dmean, tile.dr[i] = to + dscale;
      tile.unit[i] = u;
      if (tile.n == kBlock) flush();
    });
    if (tile.n) flush();
  }

  static void body(void* self, int64_t begin, int64_t end) {
    auto* job = static_cast<BackwardJob*>(self);
    job->flat ? job->by_flat(begin, end) : job->runs.possible ? job->by_runs(begin, end) : job->by_tiles(begin, end);
  }
};

template <typename T>
void backward(const Gaussian& g, const GaussianBackward& io, const Launch& on) {
  const Coupling k = as_coupling(g);
  BackwardJob<T> job(k, io);
  if (job.units && (io.dx.data || io.dparams.data))
    on.parallel(job.units, job.grain(k.channels * k.positions), &job, BackwardJob<T>::body);
}

}  // namespace

void gaussian_log_density_forward(const Gaussian& k, const GaussianForward& io, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, io, on) : forward<float>(k, io, on);
}

void gaussian_log_density_backward(const Gaussian& k, const GaussianBackward& io, const Launch& on) {
  k.data == DType::f64 ? backward<double>(k, io, on) : backward<float>(k, io, on);
}

}  // namespace NF_ISA
}  // namespace nf
