// The raw affine coupling ops: shapes checked again (a raw op can be called by anyone), outputs allocated, kernels
// called. Schemas are defined in nfkernels/ops/affine_coupling.py.

#include "../include/kernels.h"
#include "coupling.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

std::tuple<Tensor, Tensor> affine_coupling_forward(Tensor x, Tensor params, OptionalTensor channel_map,
                                                   OptionalTensor mask, OptionalTensor gain, OptionalTensor logdet,
                                                   int64_t form, double prescale, double offset, double gain_factor,
                                                   double clamp, double eps) {
  const Coupling k = coupling_of(x, params, channel_map, mask, gain, form, {prescale, offset, gain_factor, clamp, eps});
  Tensor y = torch::stable::empty_like(x);
  Tensor total = new_vector(x, k.batch, compute_type(x));
  CouplingForward io{read(x), read(params), write(y), data_of(logdet), 0, total.mutable_data_ptr()};
  if (logdet) {
    check_shape(logdet->scalar_type() == compute_type(x) && logdet->numel() == k.batch, "logdet must be [B]");
    check_device(x, *logdet);
    io.logdet_in_stride = logdet->stride(0);
  }
  Run on(x);
  kernels().affine_coupling_forward(k, io, on.launch());
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> affine_coupling_backward(Tensor y, Tensor params, OptionalTensor dy,
                                                                    OptionalTensor dlogdet, OptionalTensor channel_map,
                                                                    OptionalTensor mask, OptionalTensor gain,
                                                                    int64_t form, double prescale, double offset,
                                                                    double gain_factor, double clamp, double eps,
                                                                    bool rebuild) {
  const Coupling k = coupling_of(y, params, channel_map, mask, gain, form, {prescale, offset, gain_factor, clamp, eps});
  Tensor dx = torch::stable::empty_like(y);
  Tensor dparams = torch::stable::empty_like(params);
  // A map that names a params channel twice or never is the caller's error; it must not show uninitialised memory.
  if (channel_map) torch::stable::zero_(dparams);
  Tensor dgain = new_vector(y, gain ? k.transformed : 0, compute_type(y));
  Tensor x = rebuild ? torch::stable::empty_like(y) : new_vector(y, 0, y.scalar_type());
  CouplingBackward io{};
  io.y = read(y);
  io.params = read(params);
  io.dx = write(dx);
  io.dparams = write(dparams);
  if (dy) {
    check_shape(dy->scalar_type() == y.scalar_type() && dy->numel() == y.numel(), "dy must be like y");
    check_device(y, *dy);
    io.dy = read(*dy);
  }
  if (dlogdet) {
    check_shape(dlogdet->scalar_type() == compute_type(y) && dlogdet->numel() == k.batch, "dlogdet must be [B]");
    check_device(y, *dlogdet);
    io.dlogdet = dlogdet->const_data_ptr();
    io.dlogdet_stride = dlogdet->stride(0);
  }
  if (rebuild) io.x = write(x);
  io.dgain = gain ? dgain.mutable_data_ptr() : nullptr;
  Run on(y);
  kernels().affine_coupling_backward(k, io, on.launch());
  return {dx, dparams, dgain, x};
}

}  // namespace

void register_affine_coupling(StableLibrary& library) {
  library.impl("_affine_coupling_forward", TORCH_BOX(&affine_coupling_forward));
  library.impl("_affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
}

}  // namespace nf
