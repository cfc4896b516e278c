// Triangles of a matrix against columns of data, in place: the arithmetic of LU-factored maps on every device.
//
// Rows go by blocks, in the order in which the rows that a block reads are not yet written (a product) or already are
// (a solve). What a block takes from the rows beside it is a product either way; then comes its own small triangle.
#pragma once

#include "scalar_math.h"

#if defined(__CUDACC__) || defined(__clang__)
#define NF_SWEEP_UNROLL _Pragma("unroll")
#else
#define NF_SWEEP_UNROLL _Pragma("GCC unroll 16")
#endif

namespace nf {
namespace {

// Two triangles in one matrix, stored by columns: A[r, k] at matrix[k * pitch + r], so that a block's coefficients of
// one row lie together. `size` rows, a multiple of the block's: what pads them is zero, and one on the diagonal.
template <typename T>
struct Triangles {
  const T* matrix;  // on its diagonal s for products, 1/s for solves: one triangle's, the other has ones
  const T* shift;   // added to the lower product, subtracted before the lower solve; or null
  int pitch, size;
  bool diagonal_below;
};

// What row k of the columns adds to a block of rows.
template <int R, typename Unit, typename T, typename Value>
NF_FN void sweep_row(const Unit& x, const T* coefficients, int k, Value (&sum)[R]) {
  const auto w = Unit::template at<R>(coefficients);
  const Value in = x.load(k);
  NF_SWEEP_UNROLL
  for (int r = 0; r < R; ++r) Unit::add(sum[r], w[r], in);
}

// `Unit`: the columns that are computed at once. load(row), store(row, value); at<R>(address): R coefficients; fill(a);
// add(sum, a, x): sum += a x; scaled_difference(x, y, a): (x - y) a. Of `parts` that share columns, each takes every
// so-many-th run of R rows of the products, and `whole(sum)` adds up what they have.
template <int R, bool lower, bool solve, typename Unit, typename T = typename Unit::Scalar>
NF_FN void sweep_block(const Unit& x, const Triangles<T>& a, bool unit, const T* shift, int r0) {
  using Value = typename Unit::Value;
  constexpr int parts = Unit::parts;
  Value sum[R];
  NF_SWEEP_UNROLL
  for (int r = 0; r < R; ++r) sum[r] = Unit::fill(parts == 1 && shift ? shift[r0 + r] : T(0));
  const int first = (lower ? 0 : r0 + R) + (parts == 1 ? 0 : x.part * R), last = lower ? r0 : a.size;
  if constexpr (parts == 1) {
    for (int k = first; k < last; ++k) sweep_row<R>(x, a.matrix + k * a.pitch + r0, k, sum);
  } else {
    for (int run = first; run < last; run += parts * R) {
      NF_SWEEP_UNROLL
      for (int k = 0; k < R; ++k) sweep_row<R>(x, a.matrix + (run + k) * a.pitch + r0, run + k, sum);
    }
  }
  // Parts write the same values to the same places: all of them must have read these rows before the first does.
  Value before[parts == 1 ? 1 : R];
  if constexpr (parts > 1) {
    NF_SWEEP_UNROLL
    for (int r = 0; r < R; ++r) before[r] = x.load(r0 + r);
    NF_SWEEP_UNROLL
    for (int r = 0; r < R; ++r) {
      sum[r] = Unit::whole(sum[r]);
      if (shift) Unit::add(sum[r], T(1), Unit::fill(shift[r0 + r]));
    }
  }
  NF_SWEEP_UNROLL
  for (int step = 0; step < R; ++step) {
    // A column of the small triangle at a time; by then its row's sum is whole.
    const int k = lower ? step : R - 1 - step;
    const auto w = Unit::template at<R>(a.matrix + (r0 + k) * a.pitch + r0);
    const T s = unit ? T(1) : w[k];
    Value own = parts == 1 ? x.load(r0 + k) : before[parts == 1 ? 0 : k];
    if (solve) own = Unit::scaled_difference(own, sum[k], s);
    NF_SWEEP_UNROLL
    for (int r = 0; r < R; ++r)
      if (lower ? r > k : r < k) Unit::add(sum[r], w[r], own);
    if (!solve) {
      Unit::add(sum[k], s, own);
      own = sum[k];
    }
    x.store(r0 + k, own);
  }
}

template <int R, bool lower, bool solve, typename Unit, typename T = typename Unit::Scalar>
NF_FN void sweep(const Unit& x, const Triangles<T>& a) {
  const T* shift = lower ? a.shift : nullptr;
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int i = 0; i < a.size; i += R)
    sweep_block<R, lower, solve>(x, a, a.diagonal_below != lower, shift, lower == solve ? i : a.size - R - i);
}

// x = lower (upper x) + shift, or upper^-1 lower^-1 (x - shift).
template <int R, bool solve, typename Unit, typename T = typename Unit::Scalar>
NF_FN void sweep_both(const Unit& x, const Triangles<T>& a) {
  sweep<R, solve, solve>(x, a);
  sweep<R, !solve, solve>(x, a);
}

}  // namespace
}  // namespace nf
