// How the staged kernels are launched. Host code.
#pragma once

#include "affine_coupling_staged.h"

namespace nf {
namespace cuda {
namespace {

// Where units write: the log-determinants themselves, or partials that a second kernel adds up.
template <typename T>
struct Totals {
  T* out;
  const T* running;
  int64_t running_stride, batch;
  int pieces;
  T* partials = nullptr;

  Totals(const CouplingForward& io, int64_t batch, int pieces, const Launch& on)
      : out(static_cast<T*>(io.logdet)),
        running(static_cast<const T*>(io.logdet_in)),
        running_stride(io.logdet_in_stride),
        batch(batch),
        pieces(pieces) {
    if (pieces != 1) partials = static_cast<T*>(on.scratch(batch * pieces * sizeof(T)));
  }
  template <typename Args>
  void into(Args& a) const {
    a.out = pieces != 1 ? partials : out;
    a.running = pieces != 1 ? nullptr : running;
    a.running_stride = running_stride;
  }
  void finish(const Launch& on) const {
    if (pieces != 1)
      launch(sum_logdets<T>, on, divide_up(batch, kThreads / 32), kThreads, 0, partials, pieces, running,
             running_stride, batch, out);
  }
};

// The stage for data along positions and channels-last params, or the reverse. False where it does not serve.
template <DType D, DType R, int V>
bool find_stage(const Coupling& k, const Tensors& t, Lines* lines, Stage* stage) {
  constexpr int64_t size = sizeof(StorageType<R>), vector = 16 / size, budget = 16 * 1024, most = 40 * 1024;
  const int64_t width = k.transformed * (k.has_scale() ? 2 : 1);
  if (k.transformed == 0 || k.positions < 2 || width * 8 * size > most || k.channels >= kSmall) return false;
  for (const bool along : {true, false}) {
    if (!lines_along(k, t, along, false, V, lines)) continue;
    bool fits = true;
    for (int i = 0; i < t.n_raw; ++i) {
      const View& v = *t.raw[i];
      fits = fits && (along ? (width == 1 || v.c == 1) && v.p == width : v.p == 1 && v.c * size % 16 == 0);
      fits = fits && (along || k.positions % vector == 0) && width * v.c + k.positions * v.p < kSmall;
      fits = fits && multiple(v.data, 16) && v.b * size % 16 == 0;
    }
    if (!fits) continue;
    int64_t stretch = 1024;
    while (stretch > 8 && stretch / 2 >= k.positions) stretch /= 2;
    while (stretch > 8 && width * stretch * size > (stretch > 32 ? budget : most)) stretch /= 2;
    const int64_t passing = k.channels - k.transformed, last = k.positions - (k.positions - 1) / stretch * stretch;
    stage->along_positions = along;
    stage->interleaved = k.interleaved && k.has_scale();
    stage->transformed = static_cast<uint32_t>(k.transformed);
    stage->width = static_cast<uint32_t>(width);
    stage->stretch = static_cast<uint32_t>(stretch);
    stage->log_stretch = log_2(stretch);
    stage->tiles = static_cast<uint32_t>(divide_up(k.positions, stretch));
    stage->positions = static_cast<uint32_t>(k.positions);
    // Rows are vectors apart, an odd number of them, so that columns spread over the banks.
    stage->pitch = static_cast<uint32_t>(along ? stretch + V : (width / V | 1) * V);
    const uint32_t second = static_cast<uint32_t>(k.transformed * (along ? stage->pitch : 1));
    stage->shift = k.has_scale() && k.scale_leads ? second : 0;
    stage->scale = k.has_scale() && !k.scale_leads ? second : 0;
    stage->by_width = Divider(width);
    stage->rows = static_cast<uint32_t>(k.transformed);
    stage->passing_rows = static_cast<uint32_t>(passing);
    stage->line[0] = Divider(along ? stretch / V : k.transformed / V);
    stage->line[1] = Divider(along ? last / V : k.transformed / V);
    stage->passing_line[0] = Divider(along ? stretch / V : passing / V);
    stage->passing_line[1] = Divider(along ? last / V : passing / V);
    if (passing == 0) stage->passing_line[0].divisor = stage->passing_line[1].divisor = 0;
    return true;
  }
  return false;
}

size_t shared_of(const Stage& s, int64_t size) {
  const size_t bytes = (s.along_positions ? s.width : s.stretch) * static_cast<size_t>(s.pitch) * size;
  return bytes < kThreads / 32 * sizeof(double) ? kThreads / 32 * sizeof(double) : bytes;
}

int pieces_of(const Stage& s, int64_t batch) {
  const int64_t wanted = divide_up(2048, batch);
  return static_cast<int>(s.tiles <= 2 ? 1 : wanted < s.tiles ? wanted : s.tiles);
}

StagePort stage_port(const View& v, DType d, const Lines& lines, int64_t channel) {
  return {moved(v.data, channel * v.c, d), v.b, static_cast<uint32_t>(lines.row_stride(v)), static_cast<uint32_t>(v.p)};
}

template <DType D, DType R, int V>
bool launch_forward_staged(const Coupling& k, const CouplingForward& io, const Launch& on) {
  using T = ArithmeticOf<D>;
  Lines lines;
  StagedForwardArgs<T> a{Formula<T>(k)};
  if (!find_stage<D, R, V>(k, {{&io.x, &io.y}, 2, {&io.params}, 1}, &lines, &a.stage)) return false;
  const int64_t rest = k.first == 0 ? k.transformed : 0;
  a.pieces = pieces_of(a.stage, k.batch);
  a.tiles_per_unit = static_cast<uint32_t>(divide_up(a.stage.tiles, a.pieces));
  a.x = stage_port(io.x, k.data, lines, k.first);
  a.y = stage_port(io.y, k.data, lines, k.first);
  a.from = stage_port(io.x, k.data, lines, rest);
  a.to = stage_port(io.y, k.data, lines, rest);
  a.params = {io.params.data, io.params.b, static_cast<uint32_t>(io.params.c)};
  a.gain = static_cast<const T*>(k.gain);
  const Totals<T> totals(io, k.batch, a.pieces, on);
  totals.into(a);
  launch(forward_staged<D, R, V>, on, k.batch * a.pieces, kThreads, shared_of(a.stage, size_of(R)), a);
  totals.finish(on);
  return true;
}

template <DType D, DType R, int V>
bool launch_backward_staged(const Coupling& k, const CouplingBackward& io, const Launch& on) {
  using T = ArithmeticOf<D>;
  Lines lines;
  const bool rebuild = io.x.data != nullptr;
  Tensors tensors{{&io.y, &io.dx}, 2, {&io.params, &io.dparams}, 2};
  if (io.dy.data) tensors.data[tensors.n_data++] = &io.dy;
  if (rebuild) tensors.data[tensors.n_data++] = &io.x;
  StagedBackwardArgs<T> a{Formula<T>(k)};
  if (!find_stage<D, R, V>(k, tensors, &lines, &a.stage)) return false;
  const int64_t rest = k.first == 0 ? k.transformed : 0;
  a.rebuild = rebuild;
  a.has_dy = io.dy.data != nullptr;
  a.read_y = k.has_scale() || rebuild;
  a.read_shift = rebuild || !k.shift_first;
  a.pieces = pieces_of(a.stage, k.batch);
  a.tiles_per_unit = static_cast<uint32_t>(divide_up(a.stage.tiles, a.pieces));
  a.y = stage_port(io.y, k.data, lines, k.first);
  a.dy = stage_port(io.dy, k.data, lines, k.first);
  a.dx = stage_port(io.dx, k.data, lines, k.first);
  a.x = stage_port(io.x, k.data, lines, k.first);
  a.y_from = stage_port(io.y, k.data, lines, rest);
  a.dy_from = stage_port(io.dy, k.data, lines, rest);
  a.dx_to = stage_port(io.dx, k.data, lines, rest);
  a.x_to = stage_port(io.x, k.data, lines, rest);
  a.params = {io.params.data, io.params.b, static_cast<uint32_t>(io.params.c)};
  a.dparams = {io.dparams.data, io.dparams.b, static_cast<uint32_t>(io.dparams.c)};
  a.dlogdet = static_cast<const T*>(io.dlogdet);
  a.dlogdet_stride = io.dlogdet_stride;
  launch(backward_staged<D, R, V>, on, k.batch * a.pieces, kThreads, shared_of(a.stage, size_of(R)), a);
  return true;
}

}  // namespace
}  // namespace cuda
}  // namespace nf
