// The rational-quadratic spline on the CPU: forward (and inverse) with the log-determinant, backward from the spline's
// x. SIMD runs across elements: params are turned into rows while they are loaded (rational_quadratic_spline_tile.h),
// and everything else is plain loops over rows (rational_quadratic_spline_block.h).

#include <cstdlib>
#include <new>

#include "isa.h"
#include "processor.h"
#include "rational_quadratic_spline_rows.h"
#include "rational_quadratic_spline_tile.h"

namespace nf {
namespace NF_ISA {
namespace {

// A block with its rows, aligned.
template <typename T>
class Scratch {
 public:
  explicit Scratch(const SplineForm& k) {
    const size_t rows = static_cast<size_t>(k.count() + 2 * k.bins) * kTile * sizeof(T);
    memory_ = std::malloc(sizeof(Block<T>) + rows + 64);
    if (!memory_) throw std::bad_alloc();
    auto* start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t(63));
    block = reinterpret_cast<Block<T>*>(start);
    block->raw = reinterpret_cast<T*>(start + sizeof(Block<T>));
    block->powers = block->raw + k.count() * kTile;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  Block<T>* block;

 private:
  void* memory_;
};

constexpr DType compute_type(const float*) { return DType::f32; }
constexpr DType compute_type(const double*) { return DType::f64; }

template <typename T>
struct ForwardJob {
  enum { x, params, y, each };
  const SplineForm& k;
  const SplineForward& io;
  Walk walk;
  SplineConstants<T> constants;
  double* partial = nullptr;  // [units], or null where elementwise

  ForwardJob(const SplineForm& form, const SplineForward& tensors)
      : k(form), io(tensors), walk(form), constants(spline_constants<T>(form)) {
    walk.add(io.x), walk.add(io.params, true), walk.add(io.y);
    if (io.each.data) walk.add(io.each);
    walk.plan(io.params);
  }

  static void body(void* self, int64_t begin, int64_t end) {
    auto* job = static_cast<ForwardJob*>(self);
    const SplineForm& k = job->k;
    double* const partial = job->partial;
    Scratch<T> scratch(k);
    Block<T>& block = *scratch.block;
    const Column<T> from(job->io.x, k.data), to(job->io.y, k.data), logs(job->io.each, compute_type(block.x));
    const Table<T> given(job->io.params, k.raw, k.count());
    if (partial)
      for (int64_t u = begin; u < end; ++u) partial[u] = 0;
    job->walk.visit(
        begin, end,
        [&](const Tile& t) {
          from.load(t.at[x], t.n, block.x);
          given.load(t.at[params], t.n, block.raw);
          k.softclip ? forward_block<T, true>(block, k, padded(t.n), job->constants)
                     : forward_block<T, false>(block, k, padded(t.n), job->constants);
          to.store(t.at[y], t.n, block.y);
          logs.store(t.at[each], t.n, block.log);
          if (partial)
            for (int i = 0; i < t.n; ++i) partial[t.unit[i]] += block.log[i];
        },
        [&](const Tile& t) {
          const T none[kTile] = {};
          from.load(t.at[x], t.n, block.y);
          to.store(t.at[y], t.n, block.y);
          logs.store(t.at[each], t.n, none);
        });
  }
};

template <typename T>
void forward(const SplineForm& k, const SplineForward& io, const Launch& on) {
  ForwardJob<T> job(k, io);
  if (io.logdet) {
    job.partial = static_cast<double*>(std::malloc((job.walk.units + 1) * sizeof(double)));
    if (!job.partial) throw std::bad_alloc();
  }
  if (job.walk.units) on.parallel(job.walk.units, job.walk.grain(), &job, ForwardJob<T>::body);
  if (!io.logdet) return;
  T* out = static_cast<T*>(io.logdet);
  const T* in = static_cast<const T*>(io.logdet_in);
  const int64_t pieces = job.walk.units ? job.walk.pieces : 0;
  for (int64_t b = 0; b < k.batch; ++b) {
    double total = 0;
    for (int64_t i = 0; i < pieces; ++i) total += job.partial[b * pieces + i];
    out[b] = static_cast<T>(in ? total + in[b * io.logdet_in_stride] : total);
  }
  std::free(job.partial);
}

template <typename T>
struct BackwardJob {
  enum { x, params, dy, dx, dparams, dlogdet };
  const SplineForm& k;
  const SplineBackward& io;
  Walk walk;
  SplineConstants<T> constants;

  BackwardJob(const SplineForm& form, const SplineBackward& tensors)
      : k(form), io(tensors), walk(form), constants(spline_constants<T>(form)) {
    walk.add(io.x), walk.add(io.params, true), walk.add(io.dy), walk.add(io.dx), walk.add(io.dparams, true);
    if (form.elementwise) walk.add(io.dlogdet);
    walk.plan(io.params);
  }

  // [B]: each sample's, to its elements.
  void load_dlogdet(const Tile& t, T* row) const {
    const auto* all = static_cast<const T*>(io.dlogdet.data);
    for (int i = t.n; i < padded(t.n); ++i) row[i] = T(0);
    if (!all)
      for (int i = 0; i < t.n; ++i) row[i] = T(0);
    else if (walk.pieces == 1)
      for (int i = 0; i < t.n; ++i) row[i] = all[t.unit[i] * io.dlogdet.b];
    else
      for (int i = 0; i < t.n; ++i) row[i] = all[t.unit[i] / walk.pieces * io.dlogdet.b];
  }

  static void body(void* self, int64_t begin, int64_t end) {
    auto* job = static_cast<BackwardJob*>(self);
    const SplineForm& k = job->k;
    const SplineBackward& io = job->io;
    Scratch<T> scratch(k);
    Block<T>& block = *scratch.block;
    const Column<T> from(io.x, k.data), above(io.dy, k.data), to(io.dx, k.data);
    const Column<T> logs(io.dlogdet, compute_type(block.x));
    const Table<T> given(io.params, k.raw, k.count()), made(io.dparams, k.raw, k.count());
    const bool need_dparams = io.dparams.data;
    job->walk.visit(
        begin, end,
        [&](const Tile& t) {
          from.load(t.at[x], t.n, block.x);
          above.load(t.at[dy], t.n, block.dy);
          if (k.elementwise)
            logs.load(t.at[dlogdet], t.n, block.dlogdet);
          else
            job->load_dlogdet(t, block.dlogdet);
          given.load(t.at[params], t.n, block.raw);
          k.softclip ? backward_block<T, true>(block, k, padded(t.n), job->constants, need_dparams)
                     : backward_block<T, false>(block, k, padded(t.n), job->constants, need_dparams);
          to.store(t.at[dx], t.n, block.dx);
          if (need_dparams) made.store(t.at[dparams], t.n, block.raw);
        },
        [&](const Tile& t) {
          above.load(t.at[dy], t.n, block.dy);
          to.store(t.at[dx], t.n, block.dy);
          if (!need_dparams) return;
          const T none = 0;
          for (int i = 0; i < t.n; ++i)
            for (int r = 0; t.unit[i] && r < k.count(); ++r) {
              const int64_t at = t.at[dparams][i] + r * io.dparams.c;
              made.column.scatter(io.dparams.data, &at, 1, &none);
            }
        });
  }
};

template <typename T>
void backward(const SplineForm& k, const SplineBackward& io, const Launch& on) {
  BackwardJob<T> job(k, io);
  if (job.walk.units) on.parallel(job.walk.units, job.walk.grain(), &job, BackwardJob<T>::body);
}

template <typename T>
void transform_rows(const SplineForm& k, T* raw, T* powers, T* x, T* log, int n) {
  static_assert(kSplineRow == kTile);
  Block<T> block;
  block.raw = raw;
  block.powers = powers;
  std::memcpy(block.x, x, n * sizeof(T));
  const SplineConstants<T> constants = spline_constants<T>(k);
  k.softclip ? forward_block<T, true>(block, k, n, constants) : forward_block<T, false>(block, k, n, constants);
  std::memcpy(x, block.y, n * sizeof(T));
  std::memcpy(log, block.log, n * sizeof(T));
}

}  // namespace

void spline_rows(const SplineForm& k, float* raw, float* powers, float* x, float* log, int n) {
  transform_rows(k, raw, powers, x, log, n);
}

void spline_rows(const SplineForm& k, double* raw, double* powers, double* x, double* log, int n) {
  transform_rows(k, raw, powers, x, log, n);
}

void rational_quadratic_spline_forward(const SplineForm& k, const SplineForward& io, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, io, on) : forward<float>(k, io, on);
}

void rational_quadratic_spline_backward(const SplineForm& k, const SplineBackward& io, const Launch& on) {
  k.data == DType::f64 ? backward<double>(k, io, on) : backward<float>(k, io, on);
}

}  // namespace NF_ISA
}  // namespace nf
