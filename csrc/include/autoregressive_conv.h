// out_p = W_0 x_p + sum_t W_t s_{p - t} + bias, where s is x, or out itself (the solution of a triangular system whose
// triangle is in the weights already), to every kernel.
#pragma once

#include "scalar_math.h"
#include "types.h"

namespace nf {

// Which pixels a pixel looks at: those at p - t, or p + t where reversed. Tap 0 is the pixel itself.
struct ConvForm {
  int rows, columns;  // of the whole kernel, odd
  bool raster;        // else square
  bool reverse;
  bool solve;
};

struct AutoregressiveConv {
  DType data;  // of x and y; weight and bias are in the arithmetic's type (double for f64, else float)
  int64_t batch, channels, height, width;
  View x, y;
  const void* weight;  // [taps, channels, channels], row-major
  const void* bias;    // [channels] or null
  ConvForm form;
};

namespace {

NF_FN int tap_count(const ConvForm& f) {
  return f.raster ? f.rows / 2 * f.columns + f.columns / 2 + 1 : (f.rows / 2 + 1) * (f.columns / 2 + 1);
}

NF_FN void tap_offset(const ConvForm& f, int t, int* h, int* w) {
  const int half = f.columns / 2;
  if (f.raster) {
    *h = (t + half) / f.columns;
    *w = (t + half) % f.columns - half;
  } else {
    *h = t / (half + 1);
    *w = t % (half + 1);
  }
}

// w + skew h grows by at least 1 along every offset: pixels that have it in common need none of each other.
NF_FN int skew_of(const ConvForm& f) { return f.raster ? f.columns / 2 + 1 : 1; }

}  // namespace
}  // namespace nf
