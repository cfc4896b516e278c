// Philox uniforms for a run of elements, and the runs of memory that consecutive elements lie in.
#pragma once

#include "../include/philox.h"
#include "convert.h"
#include "isa.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int kNoise = 256;                    // elements of a block at most
constexpr int kCounters = 16;                  // computed at once: whole vectors, whatever the instruction set
constexpr int kRoom = kNoise + 4 * kCounters;  // of a block's buffer
constexpr int64_t kNoiseUnit = 16384;          // elements of a unit of work, about

// The uniforms of elements first .. first + n - 1 (n <= kNoise) somewhere in `buffer` [kRoom].
template <typename T>
const T* uniform_block(int64_t first, int n, const PhiloxKey& key, T* buffer) {
  const int skipped = static_cast<int>(first & 3);
  const uint64_t counter = static_cast<uint64_t>(first) >> 2;
  for (int done = 0; done < skipped + n; done += 4 * kCounters) {
    uint32_t a[kCounters], b[kCounters], c[kCounters], d[kCounters];
    for (int i = 0; i < kCounters; ++i) {
      const PhiloxWords v = philox(counter + static_cast<uint64_t>(done / 4 + i), key);
      a[i] = v.a, b[i] = v.b, c[i] = v.c, d[i] = v.d;
    }
    T* to = buffer + done;
    for (int i = 0; i < kCounters; ++i) {
      to[4 * i] = philox_unit(a[i]);
      to[4 * i + 1] = philox_unit(b[i]);
      to[4 * i + 2] = philox_unit(c[i]);
      to[4 * i + 3] = philox_unit(d[i]);
    }
  }
  return buffer + skipped;
}

struct Extent {
  int64_t batch, channels, positions;
  int64_t elements() const { return channels * positions; }
};

// [B, C, P] with as few axes as the views allow: one position means that the channels are the run, and channels that
// follow each other at the positions' stride make one run of the whole sample. What no noise numbers (`any_order`) may
// be one run in any order that the views share.
inline Extent collapse(Extent e, View* const* views, int n, bool any_order = false) {
  if (e.positions == 1) {
    e.positions = e.channels, e.channels = 1;
    for (int i = 0; i < n; ++i) views[i]->p = views[i]->c;
  }
  bool one_run = e.channels > 1;
  for (int i = 0; i < n; ++i) one_run = one_run && views[i]->c == e.positions * views[i]->p;
  if (!one_run && any_order) {
    one_run = true;
    for (int i = 0; i < n; ++i) one_run = one_run && views[i]->c == 1 && views[i]->p == e.channels;
    for (int i = 0; i < n && one_run; ++i) views[i]->p = 1;
  }
  if (one_run) e.positions *= e.channels, e.channels = 1;
  return e;
}

// Work is cut by shape alone: pieces of large samples, several small samples together.
struct Units {
  int64_t pieces, samples, count;  // pieces per sample, samples per unit (one of the two is 1), units

  explicit Units(const Extent& e) {
    const int64_t n = e.elements();
    pieces = n <= kNoiseUnit ? 1 : (n + kNoiseUnit - 1) / kNoiseUnit;
    samples = n == 0 ? 1 : n >= kNoiseUnit ? 1 : kNoiseUnit / n;
    count = n == 0 ? 0 : pieces > 1 ? e.batch * pieces : (e.batch + samples - 1) / samples;
  }
  // The elements [begin, end) of unit u, counted over the whole tensor.
  void range(int64_t u, const Extent& e, int64_t* begin, int64_t* end) const {
    const int64_t n = e.elements();
    if (pieces > 1) {
      const int64_t b = u / pieces, i = u % pieces;
      *begin = b * n + n * i / pieces;
      *end = b * n + n * (i + 1) / pieces;
    } else {
      *begin = u * samples * n;
      *end = (u + 1) * samples < e.batch ? (u + 1) * samples * n : e.batch * n;
    }
  }
};

// Calls f(sample, channel, position, where in the block, length) for the runs that elements first .. first + n - 1 lie
// in.
template <typename F>
void each_run(const Extent& e, int64_t first, int n, F&& f) {
  int64_t p = first % e.positions, row = first / e.positions;
  for (int at = 0; at < n;) {
    const int64_t left = e.positions - p;
    const int length = left < n - at ? static_cast<int>(left) : n - at;
    f(row / e.channels, row % e.channels, p, at, length);
    at += length, p = 0, ++row;
  }
}

inline char* address(const View& v, int64_t b, int64_t c, int64_t p, int64_t width) {
  return static_cast<char*>(v.data) + (b * v.b + c * v.c + p * v.p) * width;
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
