// A scale and a shift per channel, and an order of the channels, in one pass on the CPU.

#include "../include/channel_affine.h"

#include "convert.h"
#include "mix_tile.h"

namespace nf {
namespace NF_ISA {
namespace {

template <typename T>
constexpr DType own_type() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

// One channel of one sample: where it lies, and whether the arithmetic can read it there.
struct Row {
  char* at;
  int64_t stride, size;
  bool direct;

  template <typename T>
  static Row of(const View& v, DType d, int64_t b, int64_t c, T*) {
    const int64_t size = size_of(d);
    return {static_cast<char*>(v.data) + (b * v.b + c * v.c) * size, v.p, size, d == own_type<T>() && v.p == 1};
  }
  char* from(int64_t p) const { return at + p * stride * size; }
};

template <typename T>
struct Common {
  const ChannelAffine& k;
  LoadRun<T> load;
  StoreRun<T> store;

  explicit Common(const ChannelAffine& of) : k(of), load(load_run_for<T>(of.data)), store(store_run_for<T>(of.data)) {}

  int64_t source(int64_t c) const { return k.order ? k.order[c] : c; }
  Row row(const View& v, int64_t b, int64_t c) const { return Row::of(v, k.data, b, c, static_cast<T*>(nullptr)); }
  const T* read(const Row& r, int64_t p, int n, T* buffer) const {
    if (r.direct) return reinterpret_cast<const T*>(r.from(p));
    load(r.from(p), r.stride, n, buffer);
    return buffer;
  }
  T* room(const Row& r, int64_t p, T* buffer) const { return r.direct ? reinterpret_cast<T*>(r.from(p)) : buffer; }
  void write(const Row& r, int64_t p, int n, const T* buffer) const {
    if (!r.direct) store(r.from(p), r.stride, n, buffer);
  }
};

template <typename T>
struct ForwardJob : Common<T> {
  const ChannelAffineForward& io;

  explicit ForwardJob(const ChannelAffineForward& of) : Common<T>(of.k), io(of) {}

  // Rows: the channels of the samples.
  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<ForwardJob*>(self);
    const ChannelAffine& k = job.k;
    alignas(64) T in[kTile], out[kTile];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / k.channels, c = i % k.channels;
      const T scale = static_cast<const T*>(k.scale)[c], shift = static_cast<const T*>(job.io.shift)[c];
      const Row from = job.row(k.x, b, job.source(c)), to = job.row(job.io.y, b, c);
      const int64_t step = from.direct && to.direct ? k.positions : kTile;
      for (int64_t p = 0; p < k.positions; p += step) {
        const int64_t n = k.positions - p < step ? k.positions - p : step;
        const T* x = job.read(from, p, static_cast<int>(n), in);
        T* y = job.room(to, p, out);
        NF_INDEPENDENT
        for (int64_t j = 0; j < n; ++j) y[j] = x[j] * scale + shift;
        job.write(to, p, static_cast<int>(n), out);
      }
    }
  }
};

// dx = dy scale; adds to the sums of dy x and of dy.
template <typename T>
void backward_run(const T* x, const T* dy, T* dx, int64_t n, T scale, double* by_scale, double* by_shift) {
  using V = Simd<T>;
  typename V::type s0{}, s1{}, t0{}, t1{};
  int64_t j = 0;
  for (; j + 2 * V::lanes <= n; j += 2 * V::lanes) {
    const auto g0 = V::load(dy + j), g1 = V::load(dy + j + V::lanes);
    s0 += g0 * V::load(x + j);
    s1 += g1 * V::load(x + j + V::lanes);
    t0 += g0;
    t1 += g1;
    V::store(dx + j, g0 * scale);
    V::store(dx + j + V::lanes, g1 * scale);
  }
  double s = 0, t = 0;
  for (int l = 0; l < V::lanes; ++l) s += double(s0[l]) + s1[l], t += double(t0[l]) + t1[l];
  for (; j < n; ++j) s += double(dy[j]) * x[j], t += dy[j], dx[j] = dy[j] * scale;
  *by_scale += s;
  *by_shift += t;
}

template <typename T>
struct BackwardJob : Common<T> {
  const ChannelAffineBackward& io;

  explicit BackwardJob(const ChannelAffineBackward& of) : Common<T>(of.k), io(of) {}

  // Channels, so that each sum is one thread's.
  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<BackwardJob*>(self);
    const ChannelAffine& k = job.k;
    alignas(64) T in[kTile], grad[kTile], out[kTile];
    for (int64_t c = begin; c < end; ++c) {
      const T scale = static_cast<const T*>(k.scale)[c];
      double by_scale = 0, by_shift = 0;
      for (int64_t b = 0; b < k.batch; ++b) {
        const Row from = job.row(k.x, b, job.source(c)), above = job.row(job.io.dy, b, c);
        const Row to = job.row(job.io.dx, b, job.source(c));
        const int64_t step = from.direct && above.direct && to.direct ? k.positions : kTile;
        for (int64_t p = 0; p < k.positions; p += step) {
          const int n = static_cast<int>(k.positions - p < step ? k.positions - p : step);
          const T *x = job.read(from, p, n, in), *dy = job.read(above, p, n, grad);
          backward_run(x, dy, job.room(to, p, out), n, scale, &by_scale, &by_shift);
          job.write(to, p, n, out);
        }
      }
      static_cast<T*>(job.io.dscale)[c] = static_cast<T>(by_scale);
      static_cast<T*>(job.io.dshift)[c] = static_cast<T>(by_shift);
    }
  }
};

constexpr int64_t kWorthAThread = 16384;  // elements

int64_t grain(int64_t elements) { return elements > 0 ? kWorthAThread / elements + 1 : kWorthAThread; }

template <typename T>
void forward(const ChannelAffineForward& io, const Launch& on) {
  ForwardJob<T> job(io);
  const int64_t rows = io.k.batch * io.k.channels;
  if (rows && io.k.positions) on.parallel(rows, grain(io.k.positions), &job, ForwardJob<T>::body);
}

template <typename T>
void backward(const ChannelAffineBackward& io, const Launch& on) {
  BackwardJob<T> job(io);
  if (io.k.channels) on.parallel(io.k.channels, grain(io.k.batch * io.k.positions), &job, BackwardJob<T>::body);
}

}  // namespace

void channel_affine_forward(const ChannelAffineForward& k, const Launch& on) {
  k.k.data == DType::f64 ? forward<double>(k, on) : forward<float>(k, on);
}

void channel_affine_backward(const ChannelAffineBackward& k, const Launch& on) {
  k.k.data == DType::f64 ? backward<double>(k, on) : backward<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
