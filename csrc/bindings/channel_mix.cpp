// The raw channel mix ops; schemas are defined in nfkernels/ops/channel_mix.py.

#include "../include/kernels.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

void check_matrix(const Tensor& x, const Tensor& matrix) {
  check_shape(x.dim() >= 2 && matrix.dim() == 2 && matrix.size(0) == x.size(1) && matrix.size(1) == x.size(1),
              "weight must be [C, C] for x of C channels");
  check_shape(matrix.scalar_type() == compute_type(x) && matrix.is_contiguous(),
              "weight must be contiguous, in the arithmetic's type");
  check_device(x, matrix);
}

void check_bias(const Tensor& x, const OptionalTensor& bias) {
  if (!bias) return;
  check_shape(bias->scalar_type() == compute_type(x) && bias->numel() == x.size(1) && bias->is_contiguous(),
              "bias must be contiguous [C], in the arithmetic's type");
  check_device(x, *bias);
}

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
