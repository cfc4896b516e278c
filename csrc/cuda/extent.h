// [B, C, P] with as few axes as its views allow, for kernels that work element by element. Host code.
#pragma once

#include "../include/types.h"

namespace nf {
namespace cuda {
namespace {

struct Extent {
  int64_t batch, channels, positions;
  int64_t elements() const { return channels * positions; }
};

// Strides of axes of size one are arbitrary; 0 is no obstacle to anything.
inline void clean(const Extent& e, View* const* views, int n) {
  for (int i = 0; i < n; ++i) {
    if (e.batch == 1) views[i]->b = 0;
    if (e.channels == 1) views[i]->c = 0;
    if (e.positions == 1) views[i]->p = 0;
  }
}

// One position: the channels are the positions. Channels that follow each other at the positions' stride are positions
// too, and where no element is numbered (`any_order`), so is a sample that all views hold channels-last.
inline void collapse(Extent& e, View* const* views, int n, bool any_order) {
  if (e.channels == 1) return;
  bool follow = true, last = any_order;
  for (int i = 0; i < n; ++i) {
    follow = follow && (e.positions == 1 || views[i]->c == e.positions * views[i]->p);
    last = last && views[i]->c == 1 && views[i]->p == e.channels;
  }
  if (!follow && !last) return;
  for (int i = 0; i < n; ++i) {
    if (e.positions == 1 || last) views[i]->p = views[i]->c;
    views[i]->c = 0;
  }
  e.positions *= e.channels;
  e.channels = 1;
}

// Samples that follow each other become one.
inline void join_samples(Extent& e, View* const* views, int n) {
  if (e.channels != 1 || e.batch == 1) return;
  for (int i = 0; i < n; ++i)
    if (views[i]->p != 1 || views[i]->b != e.positions) return;
  for (int i = 0; i < n; ++i) views[i]->b = 0;
  e.positions *= e.batch;
  e.batch = 1;
}

// Whether every sample is one run of memory that can go by 16 bytes.
inline bool is_run(const Extent& e, const View& v, const void* data, int64_t width) {
  const auto whole = [&](int64_t n) { return n * width % 16 == 0; };
  return e.channels == 1 && v.p == 1 && whole(e.positions) && whole(v.b) && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace
}  // namespace cuda
}  // namespace nf
