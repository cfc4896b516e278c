// lu_linear with packed triangles and its log-determinant, to the CPU's kernels.
#pragma once

#include "lu_linear.h"

namespace nf {

struct LULayerForward {
  LULinearForward linear;
  bool lower_packed, upper_packed;  // lu.lower, lu.upper: [C, C], or the strict triangle row by row [C (C - 1) / 2]
  void* logdet;                     // [batch], in the arithmetic's type
};

struct LULayerBackward {
  LULinearBackward linear;  // dlower and dupper packed where the factors are
  bool lower_packed, upper_packed;
  const void* dlogdet;  // [batch] at this stride, in the arithmetic's type, or null
  int64_t dlogdet_stride;
};

}  // namespace nf
