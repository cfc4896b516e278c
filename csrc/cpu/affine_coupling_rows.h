// Couplings of narrow tables: several rows to a block, so that the arithmetic is on whole lanes whatever a row's width.
#pragma once

#include "affine_coupling_layout.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kNarrow = 64;  // transformed elements of a row; of more, a row's own blocks are full enough

// Rows of whole lanes are used where they are, which is faster still.
inline bool is_narrow_table(const Coupling& k) {
  return k.positions == 1 && k.transformed % kLane != 0 && k.transformed < kNarrow && !k.channel_map && !k.mask.data;
}

// Elements first .. first + n of the rows b .. b + rows, end to end in the arithmetic's type, and back.
template <typename T>
struct Rows {
  char* data;
  int64_t batch, element, width;
  LoadRun<T> load;
  StoreRun<T> store;

  Rows(const View& v, DType type, int64_t step = 1)
      : data(static_cast<char*>(v.data)),
        batch(v.b),
        element(v.c * step),
        width(size_of(type)),
        load(load_run_for<T>(type)),
        store(store_run_for<T>(type)) {}

  char* at(int64_t b, int64_t offset) const { return data + (b * batch + offset) * width; }
  // Rows that follow one another at the elements' own stride (whole ones, interleaved params) are one long run.
  bool joined(int n) const { return batch == n * element; }
  void read(int64_t b, int64_t rows, int64_t offset, int n, T* to) const {
    if (joined(n)) return load(at(b, offset), element, static_cast<int>(rows * n), to);
    for (int64_t r = 0; r < rows; ++r) load(at(b + r, offset), element, n, to + r * n);
  }
  void write(int64_t b, int64_t rows, int64_t offset, int n, const T* from) const {
    if (joined(n)) return store(at(b, offset), element, static_cast<int>(rows * n), from);
    for (int64_t r = 0; r < rows; ++r) store(at(b + r, offset), element, n, from + r * n);
  }
};

// The half that passes; zeros where there is nothing to copy from.
template <typename T>
void copy_rows(const Coupling& k, const View& from, const View& to, int64_t b, int64_t rows) {
  const int64_t c0 = k.first == 0 ? k.transformed : 0, n = k.channels - k.transformed, width = size_of(k.data);
  const Rows<T> source(from, k.data), target(to, k.data);
  const bool whole = to.c == 1 && (!from.data || from.c == 1);
  for (int64_t r = b; n && r < b + rows; ++r) {
    char* dst = target.at(r, c0 * to.c);
    const char* src = from.data ? source.at(r, c0 * from.c) : nullptr;
    if (whole) {
      src ? std::memcpy(dst, src, n * width) : std::memset(dst, 0, n * width);
      continue;
    }
    for (int64_t i = 0; i < n; ++i)
      src ? std::memcpy(dst + i * to.c * width, src + i * from.c * width, width)
          : std::memset(dst + i * to.c * width, 0, width);
  }
}

// The gains of as many rows as a block holds.
template <typename T>
void repeat_gain(const Coupling& k, int64_t rows, Scratch<T>& s) {
  const T* gain = static_cast<const T*>(k.gain);
  for (int64_t r = 0; gain && r < rows; ++r)
    for (int64_t j = 0; j < k.transformed; ++j) {
      s.g[r * k.transformed + j] = gain[j];
      s.log_g[r * k.transformed + j] = static_cast<T>(std::log(static_cast<double>(gain[j])));
    }
}

// Calls f(b, rows) for the rows [begin, end), a block at a time.
template <typename F>
void each_block(const Coupling& k, int64_t begin, int64_t end, F&& f) {
  const int64_t most = kBlock / k.transformed;
  for (int64_t b = begin; b < end; b += most) f(b, end - b < most ? end - b : most);
}

template <typename T>
void forward_rows(const Common<T>& job, const CouplingForward& io, BlockFunction<T> compute, double* partial,
                  int64_t begin, int64_t end) {
  const Coupling& k = job.k;
  const int n = static_cast<int>(k.transformed);
  const Rows<T> x(io.x, k.data), y(io.y, k.data), params(io.params, k.raw, k.params_step());
  const int64_t shift = k.shift_offset(io.params.c), raw = k.scale_offset(io.params.c);
  Scratch<T> s;
  s.quiet();
  repeat_gain(k, kBlock / n, s);
  each_block(k, begin, end, [&](int64_t b, int64_t rows) {
    x.read(b, rows, k.first * io.x.c, n, s.x);
    params.read(b, rows, shift, n, s.t);
    if (k.has_scale()) params.read(b, rows, raw, n, s.r);
    compute(s.block(), pad(s, static_cast<int>(rows * n)), job.constants, job.shift_factor);
    y.write(b, rows, k.first * io.y.c, n, s.y);
    copy_rows<T>(k, io.x, io.y, b, rows);
    for (int64_t r = 0; r < rows; ++r) {
      double total = 0;
      for (int j = 0; j < n; ++j) total += s.log_s[r * n + j];
      partial[b + r] = total;
    }
  });
}

// `gains`: [batch, transformed], or null.
template <typename T>
void backward_rows(const Common<T>& job, const CouplingBackward& io, BlockFunction<T> compute, BlockFunction<T> rebuild,
                   double* gains, int64_t begin, int64_t end) {
  const Coupling& k = job.k;
  const int n = static_cast<int>(k.transformed);
  const Rows<T> y(io.y, k.data), dy(io.dy, k.data), dx(io.dx, k.data), x(io.x, k.data);
  const Rows<T> params(io.params, k.raw, k.params_step()), dparams(io.dparams, k.raw, k.params_step());
  const T* dlogdet = static_cast<const T*>(io.dlogdet);
  Scratch<T> s;
  s.quiet();
  fill(s.dlogdet, kBlock, T(0));
  repeat_gain(k, kBlock / n, s);
  each_block(k, begin, end, [&](int64_t b, int64_t rows) {
    const int padded = static_cast<int>(rows * n);
    y.read(b, rows, k.first * io.y.c, n, s.x);
    params.read(b, rows, k.shift_offset(io.params.c), n, s.t);
    if (k.has_scale()) params.read(b, rows, k.scale_offset(io.params.c), n, s.r);
    if (io.dy.data) dy.read(b, rows, k.first * io.dy.c, n, s.dy);
    for (int64_t r = 0; dlogdet && r < rows; ++r) fill(s.dlogdet + r * n, n, dlogdet[(b + r) * io.dlogdet_stride]);
    compute(s.block(), pad(s, padded), job.constants, job.shift_factor);
    dx.write(b, rows, k.first * io.dx.c, n, s.dx);
    dparams.write(b, rows, k.shift_offset(io.dparams.c), n, s.dt);
    if (k.has_scale()) dparams.write(b, rows, k.scale_offset(io.dparams.c), n, s.dr);
    copy_rows<T>(k, io.dy, io.dx, b, rows);
    for (int i = 0; gains && i < padded; ++i) gains[b * n + i] = s.dg[i];
    if (!io.x.data) return;
    rebuild(s.block(), pad(s, padded), job.constants, -job.shift_factor);
    x.write(b, rows, k.first * io.x.c, n, s.y);
    copy_rows<T>(k, io.y, io.x, b, rows);
  });
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
