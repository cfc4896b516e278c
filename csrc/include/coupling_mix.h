// z[b, :, p] = W coupling(x)[b, :, p] + bias, and its gradients from z, to every kernel.
#pragma once

#include "affine_coupling.h"

namespace nf {

constexpr int64_t kMixLimit = 64;  // channels: LIMIT of nfkernels/ops/coupling_mix.py

// Channels [start, start + count) of z once more, or their gradient, in a type and layout of their own.
struct Extra {
  View view;  // data null: none
  DType type;
  int64_t start, count;
};

// The coupling has neither mask nor channel map here; weight, inverse and bias are in the arithmetic's type.
struct CouplingMixForward {
  View x, params, z;
  const void* weight;     // [channels, channels], row-major
  const void* bias;       // [channels] or null
  const void* logdet_in;  // running log-determinant or null
  int64_t logdet_in_stride;
  void* logdet;  // the coupling's alone: the mix's follows from the weight
  Extra extra;
};

struct CouplingMixBackward {
  View z, params, dz, dx, dparams;  // dz.data null: zero
  View x;                           // the coupling's input, rebuilt; data null: not wanted
  Extra dextra;                     // added to dz
  const void* weight;
  const void* inverse;  // W^-1: y = W^-1 (z - bias)
  const void* bias;
  const void* dlogdet;  // null: zero
  int64_t dlogdet_stride;
  void* dweight;  // null: not wanted
  void* dbias;    // null: not wanted
  void* dgain;    // [transformed] or null
};

}  // namespace nf
