// The raw channel mix ops; schemas are defined in nfkernels/ops/channel_mix.py.

#include "../include/kernels.h"
#include "mix.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

Tensor channel_mix_forward(Tensor x, Tensor weight, OptionalTensor bias) {
  check_matrix(x, weight);
  check_bias(x, bias);
  Tensor y = torch::stable::empty_like(x);
  const MixForward io{dtype_of(x),  x.size(0), x.size(1), positions_of(x), read(x), write(y), weight.const_data_ptr(),
                      data_of(bias)};
  Run on(x);
  kernels().channel_mix_forward(io, on.launch());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_mix_backward(Tensor x, Tensor weight, Tensor dy,
                                                                OptionalTensor inverse, OptionalTensor bias,
                                                                bool need_dx, bool need_dweight, bool need_dbias) {
  check_matrix(x, weight);
  check_shape(dy.scalar_type() == x.scalar_type() && dy.numel() == x.numel(), "dy must be like x");
  check_device(x, dy);
  check_bias(x, bias);
  if (inverse) check_matrix(x, *inverse);
  const int64_t channels = x.size(1);
  Tensor dx = need_dx ? torch::stable::empty_like(x) : new_vector(x, 0, x.scalar_type());
  Tensor dweight = need_dweight ? torch::stable::empty_like(weight) : new_vector(weight, 0, weight.scalar_type());
  Tensor dbias = new_vector(weight, need_dbias ? channels : 0, weight.scalar_type());
  Tensor rebuilt = inverse ? torch::stable::empty_like(x) : new_vector(x, 0, x.scalar_type());
  MixBackward io{};
  io.data = dtype_of(x);
  io.batch = x.size(0);
  io.channels = channels;
  io.positions = positions_of(x);
  io.x = read(x);
  io.dy = read(dy);
  if (need_dx) io.dx = write(dx);
  io.weight = weight.const_data_ptr();
  io.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
  io.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
  if (inverse) {
    io.inverse = inverse->const_data_ptr();
    io.bias = data_of(bias);
    io.rebuilt = write(rebuilt);
  }
  Run on(x);
  kernels().channel_mix_backward(io, on.launch());
  return {dx, dweight, dbias, rebuilt};
}

}  // namespace

void register_channel_mix(StableLibrary& library) {
  library.impl("_channel_mix_forward", TORCH_BOX(&channel_mix_forward));
  library.impl("_channel_mix_backward", TORCH_BOX(&channel_mix_backward));
}

}  // namespace nf
