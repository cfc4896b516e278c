// Dequantisation on the CPU. Elements are taken in their logical order, which numbers the noise, in blocks of up to
// 256; blocks and units of work are cut by shape alone, so results do not depend on threads.

#include "../include/dequantize.h"

#include "philox_block.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int kLanes = 16;  // whole vectors of every instruction set

int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <typename T>
void load_bytes(const void* base, int64_t stride, int n, T* to) {
  const auto* from = static_cast<const uint8_t*>(base);
  if (stride == 1)
    for (int i = 0; i < n; ++i) to[i] = from[i];
  else
    for (int i = 0; i < n; ++i) to[i] = from[i * stride];
}

template <typename T>
double sum(const T* v, int n) {
  T lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += v[i + l];
  double total = 0;
  for (; i < n; ++i) total += v[i];
  for (int l = 0; l < kLanes; ++l) total += lanes[l];
  return total;
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardJob {
  View x, y;
  Extent extent;
  PhiloxKey key;
  GreyConstants<T> grey;
  LoadRun<T> load;
  StoreRun<T> store;
  int64_t x_width, y_width;
  double* partial;  // [samples, pieces], null without a logit

  void block(int64_t first, int n, int64_t piece, const Units& units, T* xs, T* buffer, T* ys, T* terms) const {
    const T* noise = uniform_block(first, n, key, buffer);
    each_run(extent, first, n, [&](int64_t b, int64_t c, int64_t p, int at, int length) {
      load(address(x, b, c, p, x_width), x.p, length, xs + at);
    });
    const GreyConstants<T> k = grey;
    const int whole = padded(n);
    if (!partial) {
      for (int i = 0; i < whole; ++i) ys[i] = unit_of(xs[i], noise[i], k);
    } else {
      for (int i = 0; i < whole; ++i) {
        const Logit<T> made = logit_of(unit_of(xs[i], noise[i], k), k);
        ys[i] = made.y;
        terms[i] = made.log_slope;
      }
    }
    each_run(extent, first, n, [&](int64_t b, int64_t c, int64_t p, int at, int length) {
      store(address(y, b, c, p, y_width), y.p, length, ys + at);
      if (partial) partial[b * units.pieces + piece] += sum(terms + at, length);
    });
  }

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<ForwardJob*>(self);
    const Units units(job.extent);
    T xs[kNoise] = {}, buffer[kRoom], ys[kNoise], terms[kNoise];
    for (int64_t u = begin; u < end; ++u) {
      int64_t first, last;
      units.range(u, job.extent, &first, &last);
      for (int64_t i = first; i < last; i += kNoise)
        job.block(i, static_cast<int>(last - i < kNoise ? last - i : kNoise), u % units.pieces, units, xs, buffer, ys,
                  terms);
    }
  }
};

template <typename T>
void forward(const DequantizeForward& k, const Launch& on) {
  ForwardJob<T> job{k.x,
                    k.y,
                    {k.batch, k.channels, k.positions},
                    philox_key(k.key),
                    grey_constants<T>(k.levels, k.alpha, k.data),
                    k.bytes ? load_bytes<T> : load_run_for<T>(k.data),
                    store_run_for<T>(k.data),
                    k.bytes ? 1 : size_of(k.data),
                    size_of(k.data),
                    nullptr};
  View* views[] = {&job.x, &job.y};
  job.extent = collapse(job.extent, views, 2);
  const Units units(job.extent);
  if (k.alpha >= 0) {
    job.partial = static_cast<double*>(on.scratch(k.batch * units.pieces * sizeof(double)));
    for (int64_t i = 0; i < k.batch * units.pieces; ++i) job.partial[i] = 0;
  }
  if (units.count) on.parallel(units.count, 1, &job, ForwardJob<T>::body);
  const T* in = static_cast<const T*>(k.logdet_in);
  for (int64_t b = 0; b < k.batch; ++b) {
    double total = 0;
    for (int64_t i = 0; job.partial && i < units.pieces; ++i) total += job.partial[b * units.pieces + i];
    static_cast<T*>(k.logdet)[b] = static_cast<T>(in ? total + in[b * k.logdet_in_stride] : total);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardJob {
  View y, dy, dx;
  Extent extent;
  GreyConstants<T> grey;
  const T* dlogdet;
  int64_t dlogdet_stride;
  bool logit;
  LoadRun<T> load;
  StoreRun<T> store;
  int64_t width;

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<BackwardJob*>(self);
    const Units units(job.extent);
    const GreyConstants<T> k = job.grey;
    T ys[kNoise] = {}, dys[kNoise] = {}, dxs[kNoise];
    for (int64_t u = begin; u < end; ++u) {
      int64_t first, last;
      units.range(u, job.extent, &first, &last);
      for (int64_t i = first; i < last; i += kNoise) {
        const int n = static_cast<int>(last - i < kNoise ? last - i : kNoise);
        each_run(job.extent, i, n, [&](int64_t b, int64_t c, int64_t p, int, int length) {
          const int whole = padded(length);
          if (job.dy.data) job.load(address(job.dy, b, c, p, job.width), job.dy.p, length, dys);
          if (job.logit) {
            const T dlogdet = job.dlogdet ? job.dlogdet[b * job.dlogdet_stride] : T(0);
            job.load(address(job.y, b, c, p, job.width), job.y.p, length, ys);
            for (int j = 0; j < whole; ++j) dxs[j] = logit_gradient(ys[j], dys[j], dlogdet, k);
          } else {
            for (int j = 0; j < whole; ++j) dxs[j] = k.slope * dys[j];
          }
          job.store(address(job.dx, b, c, p, job.width), job.dx.p, length, dxs);
        });
      }
    }
  }
};

template <typename T>
void backward(const DequantizeBackward& k, const Launch& on) {
  BackwardJob<T> job{k.y,
                     k.dy,
                     k.dx,
                     {k.batch, k.channels, k.positions},
                     grey_constants<T>(k.levels, k.alpha, k.data),
                     static_cast<const T*>(k.dlogdet),
                     k.dlogdet_stride,
                     k.alpha >= 0,
                     load_run_for<T>(k.data),
                     store_run_for<T>(k.data),
                     size_of(k.data)};
  View* views[] = {&job.y, &job.dx, &job.dy};
  job.extent = collapse(job.extent, views, k.dy.data ? 3 : 2, true);
  const int64_t units = Units(job.extent).count;
  if (units) on.parallel(units, 1, &job, BackwardJob<T>::body);
}

}  // namespace

void dequantize_forward(const DequantizeForward& k, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, on) : forward<float>(k, on);
}

void dequantize_backward(const DequantizeBackward& k, const Launch& on) {
  k.data == DType::f64 ? backward<double>(k, on) : backward<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
