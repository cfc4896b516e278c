// Gaussian log-density on CUDA: chooses how samples are walked, cut and summed. Everything here depends on shapes,
// layouts and types alone, never on the device, so results do not either.

#include "gaussian_log_density_kernels.h"

namespace nf {
namespace cuda {
namespace gaussian {
namespace {

constexpr int kLogThreads = 8;
static_assert(1 << kLogThreads == kThreads);
constexpr int64_t kWarpItems = 8;   // vectors or tile cells of a thread, up to which a warp has a sample to itself
constexpr int64_t kBlockItems = 8;  // of a thread, in each piece of a large sample

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

int log2_up(int64_t n) {  // the smallest k with 2^k >= n
  int k = 0;
  while (int64_t{1} << k < n) ++k;
  return k;
}

int smaller(int a, int b) { return a < b ? a : b; }

// --- the cut into units ----------------------------------------------------------------------------------------------

// `cells`: vectors or cells of tiles in a sample.
int choose_log_team(int64_t cells) { return cells <= 32 * kWarpItems ? smaller(log2_up(cells), 5) : kLogThreads; }

Units cut(int64_t batch, int64_t per_sample, int64_t per_piece, int log_team) {
  Units u{};
  u.log_team = log_team;
  u.per_sample = per_sample;
  u.pieces = 1;
  u.per_piece = per_sample;
  if (log_team == kLogThreads && per_sample > per_piece) {
    // Past a million pieces they grow instead, so that partials stay few.
    const int64_t pieces = divide_up(per_sample, per_piece) < 1 << 20 ? divide_up(per_sample, per_piece) : 1 << 20;
    u.per_piece = divide_up(per_sample, pieces);
    u.pieces = static_cast<int>(divide_up(per_sample, u.per_piece));
  }
  u.count = batch * u.pieces;
  return u;
}

int64_t blocks_of(const Units& u) { return divide_up(u.count, kThreads >> u.log_team); }

// --- a problem, its strides cleaned ----------------------------------------------------------------------------------

struct Tensor {
  View at;
  DType type;
};

// What the walk is chosen by. mean, log_scale and their gradients are tensors like x; not there: data null.
struct Problem {
  int64_t batch, channels, positions;
  Tensor tensors[6];  // x, mean, log_scale, dx, dmean, dlog_scale
  bool learned;

  const View& view(int i) const { return tensors[i].at; }
};

View shifted(View v, int64_t elements, DType type) {
  if (v.data) v.data = static_cast<char*>(v.data) + elements * size_of(type);
  return v;
}

Problem problem_of(const Gaussian& k, const View& x, const View& params, const View& dx, const View& dparams) {
  Problem q{k.batch, k.channels, k.positions, {}, k.learned};
  const auto set = [&](int i, View v, int64_t step, DType type) {
    // The stride of an axis of size one is arbitrary, and no obstacle.
    v.b = k.batch > 1 ? v.b : 0;
    v.c = k.channels > 1 ? v.c * step : 0;
    v.p = k.positions > 1 ? v.p : 0;
    q.tensors[i] = {v, type};
  };
  set(0, x, 1, k.data);
  set(3, dx, 1, k.data);
  if (k.learned) {
    set(1, shifted(params, k.mean_offset(params.c), k.raw), k.params_step(), k.raw);
    set(2, shifted(params, k.scale_offset(params.c), k.raw), k.params_step(), k.raw);
    set(4, shifted(dparams, k.mean_offset(dparams.c), k.raw), k.params_step(), k.raw);
    set(5, shifted(dparams, k.scale_offset(dparams.c), k.raw), k.params_step(), k.raw);
  }
  return q;
}

// --- runs ------------------------------------------------------------------------------------------------------------

struct Run {
  int width = 0;  // of a vector; 0: no such walk
  Units units;
  Rows rows;
  Line lines[6];
};

bool aligned(const Line& line, DType type, int width, bool apart) {
  const int64_t bytes = width * size_of(type), unit = bytes < 16 ? bytes : 16;
  return reinterpret_cast<uintptr_t>(line.data) % unit == 0 && line.batch * size_of(type) % unit == 0 &&
         (!apart || line.row * size_of(type) % unit == 0);
}

// Rows along positions (a row is a channel's) or along channels, of vectors as wide as all tensors allow.
Run find_run(const Problem& q, bool along_positions, const int* widths, int n_widths) {
  Run run;
  const int64_t rows = along_positions ? q.channels : q.positions, length = along_positions ? q.positions : q.channels;
  bool unit_stride = true, joined = true;
  for (int i = 0; i < 6; ++i) {
    const View& v = q.view(i);
    if (!v.data) continue;
    const int64_t element = along_positions ? v.p : v.c, row = along_positions ? v.c : v.p;
    unit_stride = unit_stride && (length == 1 || element == 1);
    joined = joined && (rows == 1 || row == length);
    run.lines[i] = {v.data, v.b, row};
  }
  const int64_t elements = rows * length;
  // Rows apart cost a division for each vector, so they have to be vectors.
  if (!unit_stride || (!joined && elements >= int64_t{1} << 31)) return run;
  for (int w = 0; w < n_widths && !run.width; ++w) {
    const int width = widths[w];
    bool fits = joined ? elements % width == 0 : width > 1 && length % width == 0;
    for (int i = 0; i < 6 && fits; ++i)
      fits = !run.lines[i].data || aligned(run.lines[i], q.tensors[i].type, width, !joined);
    if (fits) run.width = width;
  }
  if (!run.width) return run;
  const int64_t vectors = elements / run.width;
  run.rows = {!joined, static_cast<unsigned>(joined ? 0 : length / run.width)};
  run.units = cut(q.batch, vectors, kThreads * kBlockItems, choose_log_team(vectors));
  return run;
}

Run find_run(const Problem& q, const int* widths, int n_widths) {
  const Run along_positions = find_run(q, true, widths, n_widths),
            along_channels = find_run(q, false, widths, n_widths);
  return along_channels.width > along_positions.width ? along_channels : along_positions;
}

// --- tiles -----------------------------------------------------------------------------------------------------------

struct Tiling {
  Units units;
  Tiles tiles;
};

bool channels_inner(const View& v) { return v.c && (!v.p || v.c < v.p); }

Tiling find_tiling(const Problem& q, int group) {
  const int64_t groups = divide_up(q.channels, group);
  const int log_groups = log2_up(groups), log_positions = log2_up(q.positions);
  // How many lanes along an axis read a sector (32 bytes) of the tensor that has its unit stride there; 0 for none.
  int along_p = 0, along_c = 0;
  for (int i = 0; i < 3; ++i) {
    const View& v = q.view(i);
    if (!v.data) continue;
    int& along = channels_inner(v) ? along_c : along_p;
    const int64_t lanes = 32 / size_of(q.tensors[i].type) / (channels_inner(v) ? group : 1);
    along = along > lanes ? along : static_cast<int>(lanes);
  }
  Tiling t{};
  const int log_team = choose_log_team(groups * q.positions);
  t.tiles.channels = q.channels;
  t.tiles.positions = q.positions;
  if (along_p && along_c) {
    t.tiles.log_c = smaller(smaller(log_groups, log2_up(along_c)), log_team);
    t.tiles.log_p = smaller(log2_up(along_p), log_team - t.tiles.log_c);
  } else if (along_c) {
    t.tiles.log_c = smaller(log_groups, log_team);
  } else {
    t.tiles.log_p = smaller(log_positions, log_team);
    t.tiles.log_c = smaller(log_groups, log_team - t.tiles.log_p);
  }
  const int64_t across = divide_up(q.positions, int64_t{1} << (log_team - t.tiles.log_c));
  t.tiles.across = static_cast<unsigned>(across > 1 ? across : 1);
  const int64_t tiles = across * divide_up(q.channels, static_cast<int64_t>(group) << t.tiles.log_c);
  t.units = cut(q.batch, tiles, kBlockItems, log_team);
  return t;
}

// Whether the params are packs of four channels beside float data.
bool grouped(const Problem& q) {
  if (!q.learned || q.tensors[0].type != DType::f32 || q.channels % 4 != 0) return false;
  for (int i = 1; i < 6; ++i) {
    const auto& [v, type] = q.tensors[i];
    if (i == 3 || !v.data) continue;
    const int64_t bytes = 4 * size_of(type);
    if (v.c != 1 || reinterpret_cast<uintptr_t>(v.data) % bytes || v.b * size_of(type) % bytes ||
        v.p * size_of(type) % bytes)
      return false;
  }
  return true;
}

// --- which kernel ----------------------------------------------------------------------------------------------------

// What a launch needs beyond its walk, by direction.
struct Forward {
  Total total;

  template <DType X, DType W, bool learned, int N>
  void run(const Run& r, const Launch& on) const {
    const RunForward k{r.units, r.rows, r.lines[0], r.lines[1], r.lines[2], total};
    launch(run_forward<X, W, learned, N>, on, blocks_of(r.units), kThreads, kWarps * sizeof(double), k);
  }
  template <class Access>
  void tile(const Problem& q, const Tiling& t, const Launch& on) const {
    const TileForward k{t.units, t.tiles, q.tensors[0].type, q.tensors[1].type, q.view(0), q.view(1), q.view(2), total};
    launch(tile_forward<Access>, on, blocks_of(t.units), kThreads, kWarps * sizeof(double), k);
  }
};

struct Backward {
  const void* dout;
  int64_t dout_stride;

  template <DType X, DType W, bool learned, int N>
  void run(const Run& r, const Launch& on) const {
    const RunBackward k{r.units,    r.rows,     r.lines[0], r.lines[1], r.lines[2],
                        r.lines[3], r.lines[4], r.lines[5], dout,       dout_stride};
    launch(run_backward<X, W, learned, N>, on, blocks_of(r.units), kThreads, 0, k);
  }
  template <class Access>
  void tile(const Problem& q, const Tiling& t, const Launch& on) const {
    const TileBackward k{t.units,   t.tiles,   q.tensors[0].type, q.tensors[1].type, q.view(0), q.view(1),
                         q.view(2), q.view(3), q.view(4),         q.view(5),         dout,      dout_stride};
    launch(tile_backward<Access>, on, blocks_of(t.units), kThreads, 0, k);
  }
};

struct Walk {
  Run run;
  bool packed = false;  // of tiles: four channels of params at once
  Tiling tiling;

  const Units& units() const { return run.width ? run.units : tiling.units; }
};

Walk find_walk(const Problem& q) {
  const DType x = q.tensors[0].type, w = q.learned ? q.tensors[1].type : x;
  const int wide[] = {8, 4, 1}, narrow[] = {4, 1}, one_double[] = {2}, one_half[] = {8};
  Walk walk;
  if (x == DType::f32)
    walk.run = w == DType::f32 ? find_run(q, narrow, 2) : find_run(q, wide, 3);
  else if (x == w)
    walk.run = x == DType::f64 ? find_run(q, one_double, 1) : find_run(q, one_half, 1);
  if (walk.run.width) return walk;
  walk.packed = grouped(q);
  walk.tiling = find_tiling(q, walk.packed ? 4 : 1);
  return walk;
}

template <DType X, DType W, bool learned, class Direction>
void launch_float_run(const Direction& d, const Run& run, const Launch& on) {
  if constexpr (W != DType::f32)
    if (run.width == 8) return d.template run<X, W, learned, 8>(run, on);
  run.width == 4 ? d.template run<X, W, learned, 4>(run, on) : d.template run<X, W, learned, 1>(run, on);
}

template <bool learned, class Direction>
void launch_run(const Direction& d, const Problem& q, const Run& run, const Launch& on) {
  constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  const DType x = q.tensors[0].type, w = learned ? q.tensors[1].type : x;
  if (x == f64) return d.template run<f64, f64, learned, 2>(run, on);
  if (x == bf16) return d.template run<bf16, bf16, learned, 8>(run, on);
  if (x == f16) return d.template run<f16, f16, learned, 8>(run, on);
  if constexpr (learned) {
    if (w == bf16) return launch_float_run<f32, bf16, learned>(d, run, on);
    if (w == f16) return launch_float_run<f32, f16, learned>(d, run, on);
  }
  launch_float_run<f32, f32, learned>(d, run, on);
}

template <class Direction>
void launch_walk(const Direction& d, const Problem& q, const Walk& walk, const Launch& on) {
  if (walk.run.width) {
    q.learned ? launch_run<true>(d, q, walk.run, on) : launch_run<false>(d, q, walk.run, on);
  } else if (!walk.packed) {
    q.tensors[0].type == DType::f64 ? d.template tile<Single<double>>(q, walk.tiling, on)
                                    : d.template tile<Single<float>>(q, walk.tiling, on);
  } else if (q.tensors[1].type == DType::bf16) {
    d.template tile<Packed<DType::bf16>>(q, walk.tiling, on);
  } else if (q.tensors[1].type == DType::f16) {
    d.template tile<Packed<DType::f16>>(q, walk.tiling, on);
  } else {
    d.template tile<Packed<DType::f32>>(q, walk.tiling, on);
  }
}

}  // namespace
}  // namespace gaussian

void gaussian_log_density_forward(const Gaussian& k, const GaussianForward& io, const Launch& on) {
  using namespace gaussian;
  const Problem q = problem_of(k, io.x, io.params, {}, {});
  const Walk walk = find_walk(q);
  const Units& units = walk.units();
  const bool two_stages = units.pieces > 1, wide = k.data == DType::f64;
  Total total{io.out, nullptr, io.logdet_in, io.logdet_in_stride,
              kHalfLog2Pi * static_cast<double>(k.channels * k.positions)};
  if (two_stages) {
    total.out = nullptr;
    total.partials = on.scratch(units.count * (wide ? sizeof(double) : sizeof(float)));
  }
  launch_walk(Forward{total}, q, walk, on);
  if (two_stages)
    launch(wide ? total_kernel<double> : total_kernel<float>, on, divide_up(k.batch, kWarps), kThreads, 0, total,
           io.out, k.batch, units.pieces);
}

void gaussian_log_density_backward(const Gaussian& k, const GaussianBackward& io, const Launch& on) {
  using namespace gaussian;
  if (k.batch * k.channels * k.positions == 0 || (!io.dx.data && !io.dparams.data)) return;
  const Problem q = problem_of(k, io.x, io.params, io.dx, io.dparams);
  launch_walk(Backward{io.dout, io.dout_stride}, q, find_walk(q), on);
}

}  // namespace cuda
}  // namespace nf
