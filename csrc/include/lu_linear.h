// y = P (L + I) (U + diag s) x + b at every position, or x from y, and the gradients, to every kernel.
#pragma once

#include "lu_compose.h"

namespace nf {

struct LULinearForward {
  LUFactors lu;  // one matrix, in the arithmetic's type (double for f64, else float)
  DType data;    // of x and y
  int64_t batch, positions;
  View x, y;         // inverted: x is the map's output and y its input
  const void* bias;  // [channels] or null
  bool inverse;
};

struct LULinearBackward {
  LUFactors lu;
  DType data;
  int64_t batch, positions;
  View dy, x, dx;  // x: the map's input, inverted its output; dx.data null: not wanted
  void* dlower;    // these three: [channels, channels] twice and [channels], or all null: not wanted
  void* dupper;
  void* dlog_s;
  void* dbias;  // null: not wanted
  bool inverse;
};

}  // namespace nf
