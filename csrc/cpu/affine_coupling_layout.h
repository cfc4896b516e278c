// How a coupling's work is cut into units, and where the elements of a unit lie in memory.
#pragma once

#include <cstring>

#include "affine_coupling_block.h"
#include "convert.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kUnit = 16384;  // elements of a sample per unit, about

// How the transformed half of a sample is made of unit-stride rows, the same in every tensor involved.
struct Runs {
  bool possible = false;
  bool along_positions = true;
  int64_t rows = 0, length = 0;                  // transformed
  int64_t passing_rows = 0, passing_length = 0;  // identity half
};

struct Axis {
  int64_t row, element;
};

Axis axes(const View& v, bool along_positions) { return along_positions ? Axis{v.c, v.p} : Axis{v.p, v.c}; }

// `data` are [B, C, P] views, `raw` are params views; all must agree on the axis that is at unit stride.
Runs find_runs(const Coupling& k, const View* const* data, int n_data, const View* const* raw, int n_raw) {
  Runs out;
  if (k.channel_map || k.mask.data || k.gain || k.data != k.raw || size_of(k.data) < 4) return out;
  const int64_t passing = k.channels - k.transformed;
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool along_positions = attempt == 0;
    if (!along_positions && k.interleaved && k.has_scale()) break;
    const int64_t length = along_positions ? k.positions : k.transformed;
    const int64_t rows = along_positions ? k.transformed : k.positions;
    bool unit = true, joined = !(k.interleaved && k.has_scale());
    const auto look = [&](const View& v, int64_t row_length) {
      const Axis a = axes(v, along_positions);
      if (row_length != 1 && a.element != 1) unit = false;
      if (rows != 1 && a.row != row_length) joined = false;
    };
    for (int i = 0; i < n_data; ++i) look(*data[i], length);
    for (int i = 0; i < n_raw; ++i) look(*raw[i], length);
    if (!along_positions && passing != 0) joined = false;
    if (!unit) continue;
    out.along_positions = along_positions;
    out.rows = joined ? 1 : rows;
    out.length = joined ? rows * length : length;
    out.passing_length = along_positions ? (joined ? passing * k.positions : k.positions) : passing;
    out.passing_rows = along_positions ? (joined ? 1 : passing) : k.positions;
    if (out.length >= kLane) {
      out.possible = true;
      return out;
    }
  }
  return out;
}

int64_t pieces_of(int64_t elements) { return elements <= kUnit ? 1 : (elements + kUnit - 1) / kUnit; }

template <typename T>
T* at(const View& v, int64_t b, int64_t c, int64_t p) {
  return static_cast<T*>(v.data) + b * v.b + c * v.c + p * v.p;
}

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
  T shift_sign;
  int64_t pieces, units;

  explicit Common(const Coupling& coupling)
      : k(coupling),
        constants(map_constants<T>(coupling.constants)),
        shift_sign(coupling.negate_shift ? T(-1) : T(1)),
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

template <typename T>
void copy_passing(const Coupling& k, const Runs& runs, const View& from, const View& to, int64_t b, int64_t i,
                  int64_t n) {
  if (k.channels == k.transformed) return;
  const int64_t c0 = k.first == 0 ? k.transformed : 0;
  const Part part = part_of(runs.passing_rows, runs.passing_length, i, n);
  for (int64_t row = part.row0; row < part.row1; ++row) {
    T* dst = runs.along_positions ? at<T>(to, b, c0 + row, 0) : at<T>(to, b, c0, row);
    const size_t bytes = (part.end - part.begin) * sizeof(T);
    if (from.data) {
      const T* src = runs.along_positions ? at<T>(from, b, c0 + row, 0) : at<T>(from, b, c0, row);
      std::memcpy(dst + part.begin, src + part.begin, bytes);
    } else {
      std::memset(dst + part.begin, 0, bytes);
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
  int64_t dy[kBlock], dt[kBlock], dr[kBlock];
};

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
