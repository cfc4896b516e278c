// sum_i log N(x[b, i]; mean[b, i], exp(log_scale[b, i])^2) of each sample, and its gradients, to every kernel.
#pragma once

#include "types.h"

namespace nf {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

struct Gaussian {
  DType data, raw;                // of x and of params
  bool learned;                   // false: the standard normal, no params
  bool interleaved, scale_leads;  // layout of params
  int64_t batch, channels, positions;

  // Where the means and the log-scales of a sample start, and how many channels of params there are to one of x.
  int64_t mean_offset(int64_t channel_stride) const {
    return learned && scale_leads ? (interleaved ? 1 : channels) * channel_stride : 0;
  }
  int64_t scale_offset(int64_t channel_stride) const {
    return learned && !scale_leads ? (interleaved ? 1 : channels) * channel_stride : 0;
  }
  int64_t params_step() const { return interleaved ? 2 : 1; }
};

struct GaussianForward {
  View x, params;
  const void* logdet_in;  // running total or null
  int64_t logdet_in_stride;
  void* out;  // [B] in the arithmetic's type
};

struct GaussianBackward {
  View x, params;
  View dx, dparams;  // data null: not wanted
  const void* dout;
  int64_t dout_stride;
};

}  // namespace nf
