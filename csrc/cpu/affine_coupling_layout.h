// How a coupling's work is cut into units, and where the elements of a unit lie in memory.
#pragma once

#include <cstring>

#include "affine_coupling_block.h"
#include "convert.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kUnit = 16384;  // elements of a sample per unit, about

// The transformed half of a sample as rows of at least a lane: along positions (a row is a channel's) or along channels
// (a row is a position's), or joined to one row where every tensor lies in memory like that.
struct Runs {
  bool possible = false, along_positions = true, joined = false;
  int64_t rows = 0, length = 0;                  // transformed
  int64_t passing_rows = 0, passing_length = 0;  // identity half
};

// `views` are x (or y) first, then everything else that is [B, C, P]; `raw` are of params.
Runs find_runs(const Coupling& k, const View* const* views, int n_views, const View* const* raw, int n_raw) {
  Runs out;
  if (k.channel_map || k.mask.data) return out;
  const int64_t passing = k.channels - k.transformed;
  const bool interleaved = k.interleaved && k.has_scale(), positions_first = views[0]->p <= views[0]->c;
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool along = positions_first == (attempt == 0);
    if (k.gain && !along) continue;  // a row has one gain
    const int64_t length = along ? k.positions : k.transformed, rows = along ? k.transformed : k.positions;
    bool joined = !interleaved && !k.gain && (along || passing == 0);
    // Joined rows lie end to end: those of the identity half too, which only the data has.
    const auto look = [&](const View& v, bool several) {
      const int64_t element = along ? v.p : v.c, row = along ? v.c : v.p;
      joined = joined && (length == 1 || element == 1) && (!several || row == length);
    };
    for (int i = 0; i < n_views; ++i) look(*views[i], rows > 1 || passing > 1);
    for (int i = 0; i < n_raw; ++i) look(*raw[i], rows > 1);
    out.along_positions = along;
    out.joined = joined;
    out.rows = joined ? 1 : rows;
    out.length = joined ? rows * length : length;
    out.passing_length = along ? (joined ? passing * k.positions : k.positions) : passing;
    out.passing_rows = along ? (joined ? 1 : passing) : k.positions;
    out.possible = out.length >= kLane;
    if (out.possible) break;
  }
  return out;
}

// A tensor as runs see it. Whole lanes at unit stride in the arithmetic's type are used where they are; anything else
// (other strides, narrower types, the last elements of a row) goes through scratch.
template <typename T>
struct Port {
  char* data;
  int64_t batch, channel, row, element, width;
  bool direct;
  LoadRun<T> load;
  StoreRun<T> store;

  // `step`: params channels per data channel.
  Port(const View& v, DType type, const Runs& runs, int64_t step = 1)
      : data(static_cast<char*>(v.data)),
        batch(v.b),
        channel(v.c),
        row(runs.along_positions ? v.c * step : v.p),
        element(runs.joined            ? 1
                : runs.along_positions ? v.p
                                       : v.c * step),
        width(size_of(type)),
        direct(element == 1 && type == (sizeof(T) == 8 ? DType::f64 : DType::f32)),
        load(load_run_for<T>(type)),
        store(store_run_for<T>(type)) {}

  char* start(int64_t b, int64_t c, int64_t r) const { return data + (b * batch + c * channel + r * row) * width; }
  bool in_place(int n) const { return direct && n % kLane == 0; }
  const T* read(const char* start, int64_t i, int n, T* scratch) const {
    const char* at = start + i * element * width;
    if (in_place(n)) return reinterpret_cast<const T*>(at);
    load(at, element, n, scratch);
    return scratch;
  }
  T* target(char* start, int64_t i, int n, T* scratch) const {
    return in_place(n) ? reinterpret_cast<T*>(start + i * element * width) : scratch;
  }
  void finish(char* start, int64_t i, int n, const T* from) const {
    if (!in_place(n)) store(start + i * element * width, element, n, from);
  }
};

// How many elements the next block of a row takes: whole lanes first, then the rest alone.
inline int block_size(int64_t left) {
  const int n = static_cast<int>(left < kBlock ? left : kBlock);
  return n >= kLane ? n & ~(kLane - 1) : n;
}

inline int padded_size(int n) { return n < kLane ? kLane : n; }

int64_t pieces_of(int64_t elements) { return elements <= kUnit ? 1 : (elements + kUnit - 1) / kUnit; }

// The part of rows x length that piece i of n does: whole rows, or a stretch of the only row.
struct Part {
  int64_t row0, row1, begin, end;
};

Part part_of(int64_t rows, int64_t length, int64_t i, int64_t n) {
  if (n == 1) return {0, rows, 0, length};  // small samples: no divisions
  if (rows != 1) return {rows * i / n, rows * (i + 1) / n, 0, length};
  const auto cut = [&](int64_t j) { return j == n ? length : length * j / n / kLane * kLane; };
  return {0, 1, cut(i), cut(i + 1)};
}

template <typename T>
struct Common {
  const Coupling& k;
  MapConstants<T> constants;
  T shift_factor;
  int64_t pieces, units;

  explicit Common(const Coupling& coupling)
      : k(coupling),
        constants(map_constants<T>(coupling.constants)),
        shift_factor(T(coupling.shift_factor())),
        pieces(1),
        units(0) {}

  void cut(int64_t elements, int64_t limit) {
    pieces = pieces_of(elements);
    if (pieces > limit) pieces = limit < 1 ? 1 : limit;
    units = k.batch * pieces;
  }
  int64_t sample_of(int64_t unit) const { return pieces == 1 ? unit : unit / pieces; }
  int64_t grain(int64_t elements) const {
    const int64_t per_unit = elements / pieces + 1;
    return per_unit >= kUnit ? 1 : kUnit / per_unit;
  }
};

// The identity half of a piece; zeros where there is nothing to copy from.
template <typename T>
void copy_passing(const Coupling& k, const Runs& runs, const Port<T>& from, const Port<T>& to, int64_t b, int64_t i,
                  int64_t n) {
  if (k.channels == k.transformed) return;
  const int64_t c0 = k.first == 0 ? k.transformed : 0;
  const Part part = part_of(runs.passing_rows, runs.passing_length, i, n);
  T scratch[kBlock];
  if (!from.data) fill(scratch, kBlock, T(0));
  for (int64_t row = part.row0; row < part.row1; ++row) {
    char* dst = to.start(b, c0, row);
    const char* src = from.data ? from.start(b, c0, row) : nullptr;
    if (src && from.direct && to.direct) {
      std::memcpy(dst + part.begin * to.width, src + part.begin * from.width, (part.end - part.begin) * to.width);
      continue;
    }
    for (int64_t j = part.begin; j < part.end; j += kBlock) {
      const int m = static_cast<int>(part.end - j < kBlock ? part.end - j : kBlock);
      if (src) from.load(src + j * from.element * from.width, from.element, m, scratch);
      to.store(dst + j * to.element * to.width, to.element, m, scratch);
    }
  }
}

// Visits every element of the units [begin, end) in memory order: f(unit, b, c, p).
template <typename T, typename F>
void visit(const Common<T>& job, const View& x, int64_t begin, int64_t end, F&& f) {
  const Coupling& k = job.k;
  const bool channels_outer = x.p <= x.c;
  const int64_t outer = channels_outer ? k.channels : k.positions, inner = channels_outer ? k.positions : k.channels;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = job.sample_of(u), piece = u - b * job.pieces;
    const int64_t o1 = outer * (piece + 1) / job.pieces;
    for (int64_t o = outer * piece / job.pieces; o < o1; ++o)
      for (int64_t i = 0; i < inner; ++i) channels_outer ? f(u, b, o, i) : f(u, b, i, o);
  }
}

int64_t outer_size(const Coupling& k, const View& x) { return x.p <= x.c ? k.channels : k.positions; }

// Where the elements of a tile come from, and the unit and params channel each belongs to.
struct Tile {
  int n = 0;
  int64_t x[kBlock], y[kBlock], t[kBlock], r[kBlock], unit[kBlock], channel[kBlock];
  int64_t dy[kBlock], dt[kBlock], dr[kBlock], rebuilt[kBlock];
};

// The gain of one row, for all of a block.
template <typename T>
void set_gain(const Coupling& k, int64_t channel, int n, Scratch<T>& s) {
  const T gain = static_cast<const T*>(k.gain)[channel];
  fill(s.g, n, gain);
  fill(s.log_g, n, static_cast<T>(std::log(static_cast<double>(gain))));
}

template <typename T>
void load_gain(const Coupling& k, const Tile& tile, Scratch<T>& s) {
  const T* gain = static_cast<const T*>(k.gain);
  for (int i = 0; i < tile.n; ++i) {
    s.g[i] = gain ? gain[tile.channel[i]] : T(1);
    s.log_g[i] = gain ? static_cast<T>(std::log(static_cast<double>(s.g[i]))) : T(0);
  }
}

// Pads the arrays to whole lanes with values that compute quietly.
template <typename T>
int pad(Scratch<T>& s, int n) {
  const int padded = (n + kLane - 1) / kLane * kLane;
  for (int i = n; i < padded; ++i) {
    s.x[i] = s.t[i] = s.r[i] = s.log_g[i] = s.dy[i] = s.dlogdet[i] = T(0);
    s.g[i] = T(1);
  }
  return padded;
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
