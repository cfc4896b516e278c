// Affine coupling on CUDA: forward (and inverse) with the log-determinant, backward from the output.
//
// Which kernel: lines with full vectors, then lines with params turned in shared memory, then lines element by element,
// then the one for anything. Launches and the order of every sum depend on shapes, strides and addresses alone.

#include "affine_coupling_staged_launch.h"

namespace nf {
namespace cuda {
namespace {

// The pairs of dtypes that have kernels of their own; `f(data, params)` is told them as constants. False: none.
template <DType d>
using Is = std::integral_constant<DType, d>;
template <typename F>
bool with_dtypes(DType data, DType raw, F&& f) {
  if (data == DType::f32 && raw == DType::f32) return f(Is<DType::f32>{}, Is<DType::f32>{});
  if (data == DType::f32 && raw == DType::bf16) return f(Is<DType::f32>{}, Is<DType::bf16>{});
  if (data == DType::f32 && raw == DType::f16) return f(Is<DType::f32>{}, Is<DType::f16>{});
  if (data == DType::bf16 && raw == DType::bf16) return f(Is<DType::bf16>{}, Is<DType::bf16>{});
  if (data == DType::f16 && raw == DType::f16) return f(Is<DType::f16>{}, Is<DType::f16>{});
  if (data == DType::f64 && raw == DType::f64) return f(Is<DType::f64>{}, Is<DType::f64>{});
  return false;
}
template <DType D>
constexpr int kVector = 16 / static_cast<int>(sizeof(StorageType<D>));
// Element by element: worth a kernel for what odd sizes usually come in.
constexpr bool has_narrow(DType data, DType raw) { return data == raw && (data == DType::f32 || data == DType::f64); }
constexpr bool has_staged(DType data) { return data != DType::f64; }
// A backward that also sums the gain's gradient: worth kernels of its own for float32 data.
constexpr bool has_gains(DType data) { return data == DType::f32; }

// --- forward ---------------------------------------------------------------------------------------------------------

// How samples are dealt to teams: teams of a warp or less for small samples, else blocks, several for a large sample.
struct Teams {
  int log_team = 8, pieces = 1;
  int64_t units = 0;

  Teams(int64_t batch, int64_t vectors) {
    if (vectors <= 64 || (vectors <= 512 && batch >= 4096)) {
      // The widest team that leaves few of its threads without work in its last round.
      for (log_team = 5; log_team > 0; --log_team) {
        const int64_t team = int64_t{1} << log_team;
        if (divide_up(vectors, team) * team * 7 <= vectors * 8) break;
        if (log_team == 3 && vectors > 4) break;
      }
    } else if (vectors > 2048 && (batch < 1024 || vectors > 16384)) {
      const int64_t wanted = divide_up(4096, batch), most = divide_up(vectors, 1024);
      pieces = static_cast<int>(wanted < most ? wanted : most);
    }
    units = batch * pieces;
  }
  int64_t blocks() const { return divide_up(units, kThreads >> log_team); }
  int64_t per_piece(int64_t vectors) const { return divide_up(divide_up(vectors, pieces), 32) * 32; }
  size_t shared(int64_t size) const { return log_team > 5 ? kThreads / 32 * size : 0; }
};

Port port_of(const View& v, DType d, const Lines& lines, int64_t channel, int64_t step = 1) {
  return {moved(v.data, channel * v.c, d), v.b, static_cast<uint32_t>(lines.row_stride(v, step))};
}

// The packs of params: a shift's and a scale's, or two that follow each other and hold both, alternating.
struct Pair {
  bool paired;
  int64_t first, second;  // elements from a sample's start
};

Pair pair_of(const Coupling& k, const View& v, const Lines& lines, int vector) {
  if (k.has_scale() && k.interleaved && !lines.along_positions) return {true, 0, vector};
  return {false, k.shift_offset(v.c), k.scale_offset(v.c)};
}

template <DType D, DType R, int V>
bool launch_forward_lines(const Coupling& k, const CouplingForward& io, const Launch& on) {
  using T = ArithmeticOf<D>;
  Lines lines;
  const Tensors tensors{{&io.x, &io.y}, 2, {&io.params}, 1};
  if (!find_lines(k, tensors, V, &lines)) return false;
  const int64_t vectors = lines.rows * lines.length / V, passing = lines.passing_rows * lines.passing_length / V;
  const Teams teams(k.batch, vectors > passing ? vectors : passing);
  const Totals<T> totals(io, k.batch, teams.pieces, on);
  const Pair pair = pair_of(k, io.params, lines, V);
  const int64_t rest = k.first == 0 ? k.transformed : 0;
  ForwardArgs<T> a{Formula<T>(k)};
  a.units = teams.units;
  a.pieces = teams.pieces;
  a.log_team = teams.log_team;
  a.vectors = static_cast<uint32_t>(vectors);
  a.per_piece = static_cast<uint32_t>(teams.per_piece(vectors));
  a.passing = static_cast<uint32_t>(passing);
  a.passing_per_piece = static_cast<uint32_t>(teams.per_piece(passing));
  a.line = Divider(lines.length / V);
  a.passing_line = Divider(lines.passing_length / V);
  a.x = port_of(io.x, k.data, lines, k.first);
  a.y = port_of(io.y, k.data, lines, k.first);
  a.from = port_of(io.x, k.data, lines, rest);
  a.to = port_of(io.y, k.data, lines, rest);
  a.first = a.second = port_of(io.params, k.raw, lines, 0, k.params_step());
  a.first.data = moved(io.params.data, pair.first, k.raw);
  a.second.data = moved(io.params.data, pair.second, k.raw);
  a.step = pair.paired ? 2 : 1;
  a.paired = pair.paired;
  a.scale_leads = k.scale_leads;
  a.gain = static_cast<const T*>(k.gain);
  a.gain_row = lines.along_positions;
  a.gain_column = !lines.along_positions;
  totals.into(a);
  launch(forward_lines<D, R, V>, on, teams.blocks(), kThreads, teams.shared(sizeof(T)), a);
  totals.finish(on);
  return true;
}

View shifted(const View& v, const Coupling& k, bool scale) {
  const int64_t offset = scale ? k.scale_offset(v.c) : k.shift_offset(v.c);
  return {moved(v.data, offset, k.raw), v.b, v.c * k.params_step(), v.p};
}

template <typename T>
void launch_forward_any(const Coupling& k, const CouplingForward& io, const Launch& on) {
  const int64_t elements = k.channels * k.positions;
  const Teams teams(k.batch, elements);
  const Totals<T> totals(io, k.batch, teams.pieces, on);
  AnyForwardArgs<T> a{Formula<T>(k)};
  a.data = k.data;
  a.raw = k.raw;
  a.x = io.x;
  a.y = io.y;
  a.mask = k.mask;
  a.shift = shifted(io.params, k, false);
  a.scale = shifted(io.params, k, true);
  a.channel_map = k.channel_map;
  a.first = k.first;
  a.transformed = k.transformed;
  a.units = teams.units;
  a.elements = elements;
  a.per_piece = teams.per_piece(elements);
  a.pieces = teams.pieces;
  a.log_team = teams.log_team;
  a.along_positions = k.positions > 1 && (io.x.p <= io.x.c || k.channels == 1);
  a.line = Divider(a.along_positions ? k.positions : k.channels);
  a.gain = static_cast<const T*>(k.gain);
  totals.into(a);
  if (a.line.divisor >= kSmall || a.per_piece >= kSmall)
    throw std::runtime_error("nfkernels: affine_coupling: a sample has more than 2^30 elements along one axis");
  launch(forward_any<T>, on, teams.blocks(), kThreads, teams.shared(sizeof(T)), a);
  totals.finish(on);
}

template <typename T>
void forward(const Coupling& k, const CouplingForward& io, const Launch& on) {
  if (k.batch == 0) return;
  if (k.channels * k.positions == 0) {
    launch(sum_logdets<T>, on, divide_up(k.batch, kThreads / 32), kThreads, 0, nullptr, 0,
           static_cast<const T*>(io.logdet_in), io.logdet_in_stride, k.batch, static_cast<T*>(io.logdet));
    return;
  }
  const bool done = with_dtypes(k.data, k.raw, [&](auto data, auto raw) {
    constexpr DType D = decltype(data)::value, R = decltype(raw)::value;
    if constexpr (std::is_same_v<ArithmeticOf<D>, T>) {
      if (launch_forward_lines<D, R, kVector<D>>(k, io, on)) return true;
      if constexpr (has_staged(D))
        if (launch_forward_staged<D, R, kVector<D>>(k, io, on)) return true;
      if constexpr (has_narrow(D, R)) return launch_forward_lines<D, R, 1>(k, io, on);
    }
    return false;
  });
  if (!done) launch_forward_any<T>(k, io, on);
}

// --- backward --------------------------------------------------------------------------------------------------------

Deal deal_of(int64_t channels, int64_t positions, int64_t batch, bool channels_inner, bool gains) {
  Deal d;
  d.all_channels = channels;
  d.all_places = batch * positions;
  d.channels_inner = channels_inner;
  const int64_t inner = channels_inner ? channels : d.all_places;
  const int64_t near = inner < kThreads ? inner : kThreads, far = kThreads / near;
  d.channels = static_cast<int>(channels_inner ? near : far < channels ? far : channels);
  d.places = static_cast<int>(channels_inner ? (far < d.all_places ? far : d.all_places) : near);
  d.inner = Divider(channels_inner ? d.channels : d.places);
  d.channel_blocks = divide_up(channels, d.channels);
  d.positions = Divider(positions);
  // Several rounds a thread, more where each block writes partials; fewer where that would leave processors idle.
  int64_t rounds = gains ? 16 : 8;
  while (rounds > 1 && divide_up(d.all_places, d.places * rounds) * d.channel_blocks < 2048) rounds /= 2;
  d.per_block = static_cast<uint32_t>(d.places * rounds);
  return d;
}

int64_t rows_of(const Deal& d) { return divide_up(d.all_places, d.per_block); }

// The gain's partials, and the kernel that adds them.
template <typename T>
struct GainSums {
  T *out, *partials = nullptr;
  int64_t rows, columns;

  GainSums(const CouplingBackward& io, const Deal& d, const Launch& on)
      : out(static_cast<T*>(io.dgain)), rows(rows_of(d)), columns(d.all_channels) {
    if (out) partials = static_cast<T*>(on.scratch(rows * columns * sizeof(T)));
  }
  void finish(const Coupling& k, int64_t first, const Launch& on) const {
    if (out)
      launch(sum_gains<T>, on, k.transformed, kThreads, kThreads / 32 * sizeof(T), partials, rows, columns,
             k.channel_map, first, out);
  }
};

template <DType D, DType R, int V, bool with_gain>
bool launch_backward_lines(const Coupling& k, const CouplingBackward& io, const Launch& on) {
  using T = ArithmeticOf<D>;
  Lines lines;
  const bool rebuild = io.x.data != nullptr;
  Tensors tensors{{&io.y, &io.dx}, 2, {&io.params, &io.dparams}, 2};
  if (io.dy.data) tensors.data[tensors.n_data++] = &io.dy;
  if (rebuild) tensors.data[tensors.n_data++] = &io.x;
  if (k.transformed == 0 || !find_lines(k, tensors, V, &lines)) return false;
  const bool along = lines.along_positions;
  const int64_t channels = along ? lines.rows : lines.length / V, positions = along ? lines.length / V : lines.rows;
  const Pair pair = pair_of(k, io.params, lines, V), dpair = pair_of(k, io.dparams, lines, V);
  BackwardArgs<T> a{Formula<T>(k), deal_of(channels, positions, k.batch, !along, k.gain != nullptr)};
  a.rebuild = rebuild;
  a.has_dy = io.dy.data != nullptr;
  a.paired = pair.paired;
  a.scale_leads = k.scale_leads;
  a.read_y = k.has_scale() || rebuild;
  a.read_shift = a.paired || rebuild || (k.has_scale() && !k.shift_first);
  a.read_scale = k.has_scale();
  const auto track = [&](const View& v, DType d, int64_t offset, int64_t step) {
    const int64_t row = lines.row_stride(v, step), unit = V * (along ? 1 : step);
    return Track{moved(v.data, offset, d), v.b, static_cast<uint32_t>(along ? row : unit),
                 static_cast<uint32_t>(along ? unit : row)};
  };
  a.y = track(io.y, k.data, k.first * io.y.c, 1);
  a.dy = track(io.dy, k.data, k.first * io.dy.c, 1);
  a.dx = track(io.dx, k.data, k.first * io.dx.c, 1);
  a.x = track(io.x, k.data, k.first * io.x.c, 1);
  a.first = track(io.params, k.raw, pair.first, k.params_step());
  a.second = track(io.params, k.raw, pair.second, k.params_step());
  a.dfirst = track(io.dparams, k.raw, dpair.first, k.params_step());
  a.dsecond = track(io.dparams, k.raw, dpair.second, k.params_step());
  a.dlogdet = static_cast<const T*>(io.dlogdet);
  a.dlogdet_stride = io.dlogdet_stride;
  a.gain = static_cast<const T*>(k.gain);
  const int64_t passing = lines.passing_rows * lines.passing_length / V, rest = k.first == 0 ? k.transformed : 0;
  const int64_t blocks = rows_of(a.deal) * a.deal.channel_blocks;
  a.passing = k.batch * passing;
  a.passing_per_block = divide_up(a.passing, blocks);
  a.passing_line = Divider(lines.passing_length / V);
  a.passing_vectors = Divider(passing);
  a.y_from = port_of(io.y, k.data, lines, rest);
  a.dy_from = port_of(io.dy, k.data, lines, rest);
  a.dx_to = port_of(io.dx, k.data, lines, rest);
  a.x_to = port_of(io.x, k.data, lines, rest);
  const GainSums<T> gains(io, a.deal, on);
  a.partials = gains.partials;
  launch(backward_lines<D, R, V, with_gain>, on, blocks, kThreads, gains.partials ? kThreads * sizeof(T) : 0, a);
  gains.finish(k, 0, on);
  return true;
}

template <typename T>
void launch_backward_any(const Coupling& k, const CouplingBackward& io, const Launch& on) {
  const bool along = k.positions > 1 && (io.y.p <= io.y.c || k.channels == 1);
  AnyBackwardArgs<T> a{Formula<T>(k), k.data, k.raw, deal_of(k.channels, k.positions, k.batch, !along, k.gain)};
  a.rebuild = io.x.data != nullptr;
  a.y = io.y;
  a.dy = io.dy;
  a.dx = io.dx;
  a.x = io.x;
  a.mask = k.mask;
  a.shift = shifted(io.params, k, false);
  a.scale = shifted(io.params, k, true);
  a.dshift = shifted(io.dparams, k, false);
  a.dscale = shifted(io.dparams, k, true);
  a.channel_map = k.channel_map;
  a.first = k.first;
  a.transformed = k.transformed;
  a.dlogdet = static_cast<const T*>(io.dlogdet);
  a.dlogdet_stride = io.dlogdet_stride;
  a.gain = static_cast<const T*>(k.gain);
  const GainSums<T> gains(io, a.deal, on);
  a.partials = gains.partials;
  if (k.positions >= kSmall)
    throw std::runtime_error("nfkernels: affine_coupling: a sample has more than 2^30 positions");
  launch(backward_any<T>, on, rows_of(a.deal) * a.deal.channel_blocks, kThreads,
         gains.partials ? kThreads * sizeof(T) : 0, a);
  gains.finish(k, k.first, on);
}

template <typename T>
void backward(const Coupling& k, const CouplingBackward& io, const Launch& on) {
  if (k.batch * k.channels * k.positions == 0) {
    if (io.dgain)
      launch(sum_gains<T>, on, k.transformed, kThreads, kThreads / 32 * sizeof(T), nullptr, 0, k.channels, nullptr, 0,
             static_cast<T*>(io.dgain));
    return;
  }
  const bool done = with_dtypes(k.data, k.raw, [&](auto data, auto raw) {
    constexpr DType D = decltype(data)::value, R = decltype(raw)::value;
    if constexpr (std::is_same_v<ArithmeticOf<D>, T>) {
      if (k.gain) {
        if constexpr (has_gains(D)) return launch_backward_lines<D, R, kVector<D>, true>(k, io, on);
        return false;
      }
      if (launch_backward_lines<D, R, kVector<D>, false>(k, io, on)) return true;
      if constexpr (has_staged(D))
        if (launch_backward_staged<D, R, kVector<D>>(k, io, on)) return true;
      if constexpr (has_narrow(D, R)) return launch_backward_lines<D, R, 1, false>(k, io, on);
    }
    return false;
  });
  if (!done) launch_backward_any<T>(k, io, on);
}

}  // namespace

void affine_coupling_forward(const Coupling& coupling, const CouplingForward& given, const Launch& on) {
  Coupling k = coupling;
  CouplingForward io = given;
  io.x = normal(io.x, k.batch, k.channels, k.positions);
  io.y = normal(io.y, k.batch, k.channels, k.positions);
  io.params = normal(io.params, k.batch, k.transformed * (k.has_scale() ? 2 : 1), k.positions);
  k.data == DType::f64 ? forward<double>(k, io, on) : forward<float>(k, io, on);
}

void affine_coupling_backward(const Coupling& coupling, const CouplingBackward& given, const Launch& on) {
  Coupling k = coupling;
  CouplingBackward io = given;
  for (View* v : {&io.y, &io.dy, &io.dx, &io.x}) *v = normal(*v, k.batch, k.channels, k.positions);
  for (View* v : {&io.params, &io.dparams})
    *v = normal(*v, k.batch, k.transformed * (k.has_scale() ? 2 : 1), k.positions);
  k.data == DType::f64 ? backward<double>(k, io, on) : backward<float>(k, io, on);
}

}  // namespace cuda
}  // namespace nf
