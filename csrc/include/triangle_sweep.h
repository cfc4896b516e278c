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
  const T* matrix;
  int pitch, size;
  const T* diagonal;  // s for products, 1/s for solves; one triangle has it, the other a diagonal of ones
  const T* shift;     // added to the lower product, subtracted before the lower solve; or null
  bool diagonal_below;
};

// `Unit`: the columns that are computed at once. load(row), store(row, value); at<R>(address): R coefficients; fill(a);
// add(sum, a, x): sum += a x; scaled_difference(x, y, a): (x - y) a.
template <int R, bool lower, bool solve, typename Unit, typename T = typename Unit::Scalar>
NF_FN void sweep_block(const Unit& x, const Triangles<T>& a, const T* diagonal, const T* shift, int r0) {
  using Value = typename Unit::Value;
  Value sum[R];
  NF_SWEEP_UNROLL
  for (int r = 0; r < R; ++r) sum[r] = Unit::fill(lower && shift ? shift[r0 + r] : T(0));
  const int last = lower ? r0 : a.size;
  for (int k = lower ? 0 : r0 + R; k < last; ++k) {
    const auto w = Unit::template at<R>(a.matrix + k * a.pitch + r0);
    const Value in = x.load(k);
    NF_SWEEP_UNROLL
    for (int r = 0; r < R; ++r) Unit::add(sum[r], w[r], in);
  }
  NF_SWEEP_UNROLL
  for (int step = 0; step < R; ++step) {
    // A column of the small triangle at a time; by then its row's sum is whole.
    const int k = lower ? step : R - 1 - step;
    const auto w = Unit::template at<R>(a.matrix + (r0 + k) * a.pitch + r0);
    const T s = diagonal ? diagonal[r0 + k] : T(1);
    Value own = x.load(r0 + k);
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
  const T* diagonal = a.diagonal_below == lower ? a.diagonal : nullptr;
  const T* shift = lower ? a.shift : nullptr;
  constexpr bool ascending = lower == solve;
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int i = 0; i < a.size; i += R)
    sweep_block<R, lower, solve>(x, a, diagonal, shift, ascending ? i : a.size - R - i);
}

// x = lower (upper x) + shift, or upper^-1 lower^-1 (x - shift).
template <int R, bool solve, typename Unit, typename T = typename Unit::Scalar>
NF_FN void sweep_both(const Unit& x, const Triangles<T>& a) {
  sweep<R, solve, solve>(x, a);
  sweep<R, !solve, solve>(x, a);
}

}  // namespace
}  // namespace nf
