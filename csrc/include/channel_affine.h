// y[b, i, :] = x[b, order[i], :] scale[i] + shift[i], and its gradients, to the CPU's kernels.
#pragma once

#include "types.h"

namespace nf {

struct ChannelAffine {
  DType data;  // of x and y; scale, shift and their gradients are in the arithmetic's type (double for f64, else float)
  int64_t batch, channels, positions;
  View x;
  const int64_t* order;  // [channels], a permutation, or null for none
  const void* scale;     // [channels]
};

struct ChannelAffineForward {
  ChannelAffine k;
  View y;
  const void* shift;  // [channels]
};

struct ChannelAffineBackward {
  ChannelAffine k;
  View dy, dx;
  void *dscale, *dshift;  // [channels]
};

}  // namespace nf
