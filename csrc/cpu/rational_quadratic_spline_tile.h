// Where the elements of a spline's blocks lie in memory, and how their params get there: a block has a row for each raw
// value, memory mostly has the raw values of an element side by side.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "convert.h"
#include "rational_quadratic_spline_block.h"
#include "transpose.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kUnit = 2048;   // elements of a sample per unit, about
constexpr int64_t kGrain = 6144;  // elements that are worth waking a thread for
constexpr int kMostViews = 6;

// Elements of a block: where each is in every tensor, and the unit it belongs to.
struct Tile {
  int n = 0;
  int64_t unit[kTile];
  int64_t at[kMostViews][kTile];
};

// The elements of a batch in an order that follows params' memory, cut into units: samples, or pieces of large ones. A
// unit's elements are visited in an order that depends on shapes alone.
struct Walk {
  const SplineForm& k;
  const View* views[kMostViews];
  bool of_params[kMostViews];
  int count = 0;
  bool positions_inner = false, joined = false;
  int64_t inner = 0, elements = 0, pieces = 1, units = 0;

  explicit Walk(const SplineForm& form) : k(form) {}

  void add(const View& v, bool params = false) {
    views[count] = &v;
    of_params[count++] = params;
  }

  void plan(const View& params) {
    elements = k.channels * k.positions;
    positions_inner = k.channels == 1 || (k.positions > 1 && params.p <= params.c * k.count());
    inner = positions_inner ? k.positions : k.channels;
    pieces = elements <= kUnit ? 1 : (elements + kUnit - 1) / kUnit;
    units = elements ? k.batch * pieces : 0;
    // Samples that lie end to end are one long row.
    joined = !k.mask.data && !k.channel_map && inner == elements && pieces == 1;
    for (int v = 0; v < count; ++v) joined = joined && (!views[v]->data || views[v]->b == elements * step(v));
  }

  int64_t channel_step(int v) const { return views[v]->c * (of_params[v] ? k.count() : 1); }
  int64_t step(int v) const { return positions_inner ? views[v]->p : channel_step(v); }
  int64_t offset(int v, int64_t b, int64_t c, int64_t j, int64_t p) const {
    return b * views[v]->b + (of_params[v] ? j * k.count() : c) * views[v]->c + p * views[v]->p;
  }

  int64_t grain() const {
    const int64_t each = elements / pieces + 1;
    return each >= kGrain ? 1 : kGrain / each;
  }

  // Calls transform(tile) and pass(tile) for full tiles, and for what is left. Of an element that passes and has
  // params, `unit` is 1, else 0.
  template <typename Transform, typename Pass>
  void visit(int64_t begin, int64_t end, Transform&& transform, Pass&& pass) const {
    if (k.channel_map && !k.mask.data && k.positions == 1 && !positions_inner && pieces == 1)
      return visit_table(begin, end, transform, pass);
    Tile tile, through;
    const auto* mask = static_cast<const bool*>(k.mask.data);
    const bool rows = !mask && (!k.channel_map || positions_inner);
    const auto flush_if_full = [&](Tile& t, auto& f) {
      if (t.n == kTile) f(t), t.n = 0;
    };
    const auto put = [&](Tile& t, int64_t unit, int64_t b, int64_t c, int64_t j, int64_t p) {
      for (int v = 0; v < count; ++v) t.at[v][t.n] = offset(v, b, c, j, p);
      t.unit[t.n++] = unit;
    };
    for (int64_t u = begin; u < end;) {
      const int64_t b = pieces == 1 ? u : u / pieces, piece = u - b * pieces;
      const int64_t last = joined ? (end - begin) * elements : elements * (piece + 1) / pieces;
      for (int64_t e = elements * piece / pieces; e < last;) {
        const int64_t o = joined ? 0 : e / inner, i = e - o * inner;
        const int64_t stop = joined ? last : (o + 1) * inner < last ? (o + 1) * inner : last;
        const int64_t c = positions_inner ? o : i, p = positions_inner ? i : o;
        if (!rows) {
          const int64_t j = k.source(c);
          const bool moves = j >= 0 && !(mask && !mask[b * k.mask.b + c * k.mask.c + p * k.mask.p]);
          put(moves ? tile : through, moves ? u : j >= 0, b, c, j < 0 ? 0 : j, p);
          flush_if_full(tile, transform);
          flush_if_full(through, pass);
          ++e;
          continue;
        }
        const int64_t j = k.source(c);
        Tile& t = j >= 0 ? tile : through;
        const int m = static_cast<int>(stop - e < kTile - t.n ? stop - e : kTile - t.n);
        for (int v = 0; v < count; ++v) {
          const int64_t first = offset(v, b, c, j < 0 ? 0 : j, p), by = step(v);
          int64_t* at = t.at[v] + t.n;
          for (int l = 0; l < m; ++l) at[l] = first + l * by;
        }
        if (joined && elements != 1) {
          int64_t sample = b + e / elements, left = elements - e % elements;
          for (int l = 0; l < m; ++l) {
            t.unit[t.n + l] = sample;
            if (--left == 0) ++sample, left = elements;
          }
        } else {
          for (int l = 0; l < m; ++l) t.unit[t.n + l] = j < 0 ? 0 : joined ? b + e + l : u;
        }
        t.n += m;
        e += m;
        flush_if_full(tile, transform);
        flush_if_full(through, pass);
      }
      u = joined ? end : u + 1;
    }
    if (tile.n) transform(tile);
    if (through.n) pass(through);
  }

  // The rows of a table whose columns a map chooses from: the same columns in every row.
  template <typename Transform, typename Pass>
  void visit_table(int64_t begin, int64_t end, Transform&& transform, Pass&& pass) const {
    auto* offsets = static_cast<int64_t*>(std::malloc(k.channels * kMostViews * sizeof(int64_t)));
    if (!offsets) throw std::bad_alloc();
    // Those that move from the front, those that pass from the back.
    int64_t moving = 0, last = k.channels;
    for (int64_t c = 0; c < k.channels; ++c) {
      const int64_t j = k.source(c), at = j >= 0 ? moving++ : --last;
      for (int v = 0; v < count; ++v) offsets[v * k.channels + at] = offset(v, 0, c, j < 0 ? 0 : j, 0);
    }
    Tile tile, through;
    const auto put = [&](Tile& t, auto& full, int64_t row, int64_t first, int64_t stop, bool moves) {
      while (first < stop) {
        const int m = static_cast<int>(stop - first < kTile - t.n ? stop - first : kTile - t.n);
        for (int v = 0; v < count; ++v) {
          if (!views[v]->data) continue;
          const int64_t start = row * views[v]->b;
          const int64_t* from = offsets + v * k.channels + first;
          int64_t* at = t.at[v] + t.n;
          for (int l = 0; l < m; ++l) at[l] = start + from[l];
        }
        for (int l = 0; l < m; ++l) t.unit[t.n + l] = moves ? row : 0;
        t.n += m;
        first += m;
        if (t.n == kTile) full(t), t.n = 0;
      }
    };
    for (int64_t row = begin; row < end; ++row) {
      put(tile, transform, row, 0, moving, true);
      put(through, pass, row, moving, k.channels, false);
    }
    if (tile.n) transform(tile);
    if (through.n) pass(through);
    std::free(offsets);
  }
};

inline bool consecutive(const int64_t* at, int n) {
  int64_t apart = 0;
  for (int i = 0; i < n; ++i) apart |= at[i] - at[0] - i;
  return apart == 0;
}

inline int padded(int n) { return (n + kLane - 1) & ~(kLane - 1); }

// The elements of one tensor, to and from a row.
template <typename T>
struct Column {
  char* data;
  int64_t width;
  LoadRun<T> load_run;
  StoreRun<T> store_run;
  Gather<T> gather;
  Scatter<T> scatter;

  Column(const View& v, DType d)
      : data(static_cast<char*>(v.data)),
        width(size_of(d)),
        load_run(load_run_for<T>(d)),
        store_run(store_run_for<T>(d)),
        gather(gather_for<T>(d)),
        scatter(scatter_for<T>(d)) {}

  // Zeros where there is no tensor, and in what pads the row.
  void load(const int64_t* at, int n, T* row) const {
    const int end = padded(n);
    for (int i = data ? n : 0; i < end; ++i) row[i] = T(0);
    if (!data) return;
    if (consecutive(at, n))
      load_run(data + at[0] * width, 1, n, row);
    else
      gather(data, at, n, row);
  }
  void store(const int64_t* at, int n, const T* row) const {
    if (!data) return;
    if (consecutive(at, n))
      store_run(data + at[0] * width, 1, n, row);
    else
      scatter(data, at, n, row);
  }
};

// params of a tile from memory and back, where raw value r of element i is at[i] + r * stride.
template <typename T>
struct Table {
  Column<T> column;
  DType type;
  int64_t stride;
  int count;

  Table(const View& v, DType d, int values) : column(v, d), type(d), stride(v.c), count(values) {}

  bool floats() const { return sizeof(T) == 4 && type == DType::f32 && stride == 1; }
  bool wide() const { return stride == 1; }

  void load(const int64_t* at, int n, T* raw) const {
    const int end = padded(n);
    if (end != n)
      for (int r = 0; r < count; ++r)
        for (int i = n; i < end; ++i) raw[r * kTile + i] = T(0);
    if (wide()) {
      int i = 0;
      if constexpr (sizeof(T) == 4)
        if (floats())
          for (; i + kStrip <= n; i += kStrip) load_strip(at + i, raw + i);
      for (; i < n; ++i) {
        T row[3 * kSplineMostBins + 1];
        column.load_run(column.data + at[i] * column.width, 1, count, row);
        for (int r = 0; r < count; ++r) raw[r * kTile + i] = row[r];
      }
    } else if (consecutive(at, n)) {
      for (int r = 0; r < count; ++r)
        column.load_run(column.data + (at[0] + r * stride) * column.width, 1, n, raw + r * kTile);
    } else {
      for (int r = 0; r < count; ++r) column.gather(column.data + r * stride * column.width, at, n, raw + r * kTile);
    }
  }

  void store(const int64_t* at, int n, const T* raw) const {
    if (wide()) {
      int i = 0;
      if constexpr (sizeof(T) == 4)
        if (floats())
          for (; i + kStrip <= n; i += kStrip) store_strip(at + i, raw + i);
      for (; i < n; ++i) {
        T row[3 * kSplineMostBins + 1];
        for (int r = 0; r < count; ++r) row[r] = raw[r * kTile + i];
        column.store_run(column.data + at[i] * column.width, 1, count, row);
      }
    } else if (consecutive(at, n)) {
      for (int r = 0; r < count; ++r)
        column.store_run(column.data + (at[0] + r * stride) * column.width, 1, n, raw + r * kTile);
    } else {
      for (int r = 0; r < count; ++r) column.scatter(column.data + r * stride * column.width, at, n, raw + r * kTile);
    }
  }

 private:
  // Squares of four raw values, the last one reaching back over those before it.
  void load_strip(const int64_t* at, float* raw) const {
    const auto* p = reinterpret_cast<const float*>(column.data);
    for (int r = 0; r < count; r += 4) {
      const int s = r + 4 <= count ? r : count - 4;
      Strip in[4], out[4];
      for (int i = 0; i < 4; ++i) in[i] = load_squares(p + s, at + i);
      transpose(in, out);
      for (int i = 0; i < 4; ++i) std::memcpy(raw + (s + i) * kTile, &out[i], sizeof(Strip));
    }
  }
  void store_strip(const int64_t* at, const float* raw) const {
    auto* p = reinterpret_cast<float*>(column.data);
    for (int r = 0; r < count; r += 4) {
      const int s = r + 4 <= count ? r : count - 4;
      Strip in[4], out[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&in[i], raw + (s + i) * kTile, sizeof(Strip));
      transpose(in, out);
      for (int i = 0; i < 4; ++i) store_squares(p + s, at + i, out[i]);
    }
  }
};

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
