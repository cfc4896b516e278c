// How a coupling's tensors lie in memory, as its kernels walk them. Host code; decided by shapes, strides and
// addresses.
//
// Lines: the transformed half of a sample is `rows` lines of `length` elements at unit stride, along positions (a line
// is a channel's) or along channels (a position's); all rows are one line where they lie end to end. A line is cut into
// vectors. The half that passes through is lines of its own.
#pragma once

#include "affine_coupling_math.h"

namespace nf {
namespace cuda {
namespace {

constexpr int64_t kSmall = int64_t{1} << 30;  // offsets and counts below this are computed in 32 bits

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t power_of_2_from(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}
inline int log_2(int64_t power) {
  int log = 0;
  while (power > 1) power /= 2, ++log;
  return log;
}

// Strides of axes of one element are arbitrary and mean nothing: 0 here.
inline View normal(View v, int64_t batch, int64_t channels, int64_t positions) {
  if (batch <= 1) v.b = 0;
  if (channels <= 1) v.c = 0;
  if (positions <= 1) v.p = 0;
  return v;
}

inline void* moved(void* data, int64_t elements, DType d) {
  return data ? static_cast<char*>(data) + elements * size_of(d) : nullptr;
}

struct Lines {
  bool along_positions, joined;
  int64_t rows, length, passing_rows, passing_length;

  int64_t row_stride(const View& v, int64_t step = 1) const { return joined ? 0 : along_positions ? v.c * step : v.p; }
};

// The tensors of a call. `data` are x (or y) and what is like it, `raw` params and dparams.
struct Tensors {
  const View* data[5];
  int n_data;
  const View* raw[2];
  int n_raw;
};

inline bool multiple(const void* address, int64_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// Whether every vector of `vector` elements of a view can be one access. `start`: its first channel.
inline bool wide(const View& v, DType d, int64_t start, int64_t row, int64_t vector) {
  const int64_t bytes = vector * size_of(d) < 16 ? vector * size_of(d) : 16, elements = bytes / size_of(d);
  return multiple(v.data, bytes) && start * v.c % elements == 0 && v.b % elements == 0 && row % elements == 0;
}

// The data's side of lines in one direction: unit strides, whole vectors, offsets within a sample that fit 32 bits.
inline bool data_fits(const Coupling& k, const Tensors& t, const Lines& lines, int64_t vector) {
  const int64_t passing = k.channels - k.transformed;
  if (lines.length % vector || lines.passing_length % vector) return false;
  for (int i = 0; i < t.n_data; ++i) {
    const View& v = *t.data[i];
    if ((lines.along_positions ? v.p : v.c) != 1 && (lines.length > 1 || lines.passing_length > 1)) return false;
    const int64_t row = lines.row_stride(v), start = k.first == 0 ? k.transformed : k.first;
    if (!wide(v, k.data, passing ? start : 0, row, vector)) return false;
    if ((k.channels - 1) * v.c + (k.positions - 1) * v.p >= kSmall) return false;
  }
  return true;
}

// Lines in one direction, or nothing where channels of gains would change inside one or a mask speaks.
inline bool lines_along(const Coupling& k, const Tensors& t, bool along_positions, bool join, int64_t vector,
                        Lines* out) {
  if (k.channel_map || k.mask.data) return false;
  if (k.gain && !along_positions && vector > 1) return false;  // a vector has one gain
  const int64_t passing = k.channels - k.transformed;
  bool joined = join && along_positions && !k.gain && !(k.interleaved && k.has_scale());
  for (int i = 0; i < t.n_data; ++i)
    joined = joined && ((k.transformed <= 1 && passing <= 1) || t.data[i]->c == k.positions);
  for (int i = 0; i < t.n_raw; ++i) joined = joined && (k.transformed <= 1 || t.raw[i]->c == k.positions);
  Lines lines;
  lines.along_positions = along_positions;
  lines.joined = joined;
  lines.rows = joined ? 1 : along_positions ? k.transformed : k.positions;
  lines.length = joined ? k.transformed * k.positions : along_positions ? k.positions : k.transformed;
  lines.passing_rows = joined ? 1 : along_positions ? passing : k.positions;
  lines.passing_length = joined ? passing * k.positions : along_positions ? k.positions : passing;
  if (passing == 0) lines.passing_rows = lines.passing_length = 0;
  *out = lines;
  return data_fits(k, t, lines, vector);
}

// Lines for which params lie as the data does.
inline bool find_lines(const Coupling& k, const Tensors& t, int64_t vector, Lines* out) {
  const int64_t step = k.params_step();
  const bool first = k.positions > 1 && (t.data[0]->p <= t.data[0]->c || k.channels == 1);
  for (const bool along : {first, !first}) {
    if (!lines_along(k, t, along, true, vector, out)) continue;
    bool fits = true;
    for (int i = 0; i < t.n_raw; ++i) {
      const View& v = *t.raw[i];
      const bool unit = (along ? v.p : v.c) == 1 || (out->length <= 1 && step == 1) || k.transformed == 0;
      const int64_t other = k.has_scale() && !k.interleaved ? k.transformed : 0;
      fits = fits && unit && wide(v, k.raw, other, out->row_stride(v, step), vector) &&
             wide(v, k.raw, step - 1, 0, along ? vector : 1) &&
             (k.transformed * (k.has_scale() ? 2 : 1)) * v.c + k.positions * v.p < kSmall;
    }
    if (fits) return true;
  }
  return false;
}

// A tensor's part as a kernel walks it: strides in elements.
struct Port {
  void* data = nullptr;
  int64_t batch = 0;
  uint32_t row = 0;
};

}  // namespace
}  // namespace cuda
}  // namespace nf
