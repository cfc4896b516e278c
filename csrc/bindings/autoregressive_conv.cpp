// The raw autoregressive convolution op; its schema is defined in nfkernels/ops/autoregressive_conv.py.

#include "../include/kernels.h"
#include "mix.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

Tensor autoregressive_conv_forward(Tensor x, Tensor weight, OptionalTensor bias, int64_t rows, int64_t columns,
                                   bool raster, bool reverse, bool solve) {
  check_shape(x.dim() == 4, "x must be [B, C, H, W]");
  check_shape(rows > 0 && columns > 0 && rows % 2 == 1 && columns % 2 == 1 && rows < 1024 && columns < 1024,
              "the kernel's sizes must be odd, below 1024");
  AutoregressiveConv k{};
  k.form = {static_cast<int>(rows), static_cast<int>(columns), raster, reverse, solve};
  check_shape(weight.dim() == 3 && weight.size(0) == tap_count(k.form) && weight.size(1) == x.size(1) &&
                  weight.size(2) == x.size(1),
              "weight must be [taps, C, C] for x of C channels");
  check_shape(weight.scalar_type() == compute_type(x) && weight.is_contiguous(),
              "weight must be contiguous, in the arithmetic's type");
  check_device(x, weight);
  check_bias(x, bias);
  Tensor y = torch::stable::empty_like(x);
  k.data = dtype_of(x);
  k.batch = x.size(0);
  k.channels = x.size(1);
  k.height = x.size(2);
  k.width = x.size(3);
  k.x = read(x);
  k.y = write(y);
  k.weight = weight.const_data_ptr();
  k.bias = data_of(bias);
  Run on(x);
  kernels().autoregressive_conv_forward(k, on.launch());
  return y;
}

}  // namespace

void register_autoregressive_conv(StableLibrary& library) {
  library.impl("_autoregressive_conv_forward", TORCH_BOX(&autoregressive_conv_forward));
}

}  // namespace nf
