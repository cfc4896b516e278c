// y[b, :, p] = W x[b, :, p] + bias, and its gradients, to every kernel.
#pragma once

#include "types.h"

namespace nf {

struct MixForward {
  DType data;  // of x and y; weight and bias are in the arithmetic's type (double for f64, else float)
  int64_t batch, channels, positions;
  View x, y;
  const void* weight;  // [channels, channels], row-major
  const void* bias;    // [channels] or null
};

struct MixBackward {
  DType data;
  int64_t batch, channels, positions;
  View x, dy, dx;       // dx.data null: not wanted
  const void* inverse;  // W^-1: x is then the output, and the input is rebuilt from it; or null
  const void* bias;     // of the forward, for the rebuilding; or null
  View rebuilt;         // W^-1 (x - bias), written where there is an inverse
  const void* weight;
  void* dweight;  // null: not wanted
  void* dbias;    // null: not wanted
};

}  // namespace nf
