// The raw Gaussian log-density ops; schemas are defined in nfkernels/ops/gaussian_log_density.py.

#include "../include/kernels.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

Gaussian gaussian_of(const Tensor& x, const OptionalTensor& params, int64_t layout) {
  Gaussian k{};
  check_shape(x.dim() >= 2, "x must be [B, C, ...]");
  k.data = k.raw = dtype_of(x);
  k.batch = x.size(0);
  k.channels = x.size(1);
  k.positions = positions_of(x);
  if (params) {
    check_shape(params->dim() == x.dim() && params->size(0) == k.batch && params->size(1) == 2 * k.channels &&
                    positions_of(*params) == k.positions,
                "params must be [B, 2C, ...] for x of [B, C, ...]");
    check_device(x, *params);
    k.learned = true;
    k.raw = dtype_of(*params);
    check_shape(k.raw != DType::f64 || k.data == DType::f64, "params may be narrower than x, not wider");
    k.interleaved = layout >= 2;
    k.scale_leads = layout & 1;
  }
  return k;
}

Tensor gaussian_log_density_forward(Tensor x, OptionalTensor params, OptionalTensor logdet, int64_t layout) {
  const Gaussian k = gaussian_of(x, params, layout);
  Tensor out = new_vector(x, k.batch, compute_type(x));
  GaussianForward io{read(x), read(params), data_of(logdet), 0, out.mutable_data_ptr()};
  if (logdet) {
    check_shape(logdet->scalar_type() == compute_type(x) && logdet->numel() == k.batch, "logdet must be [B]");
    check_device(x, *logdet);
    io.logdet_in_stride = logdet->stride(0);
  }
  Run on(x);
  kernels().gaussian_log_density_forward(k, io, on.launch());
  return out;
}

std::tuple<Tensor, Tensor> gaussian_log_density_backward(Tensor x, OptionalTensor params, Tensor dout, int64_t layout,
                                                         bool need_dx, bool need_dparams) {
  const Gaussian k = gaussian_of(x, params, layout);
  check_shape(dout.scalar_type() == compute_type(x) && dout.dim() == 1 && dout.size(0) == k.batch, "dout must be [B]");
  check_shape(params || !need_dparams, "there are no params to make a gradient of");
  check_device(x, dout);
  Tensor dx = need_dx ? torch::stable::empty_like(x) : new_vector(x, 0, x.scalar_type());
  Tensor dparams = need_dparams ? torch::stable::empty_like(*params) : new_vector(x, 0, x.scalar_type());
  GaussianBackward io{read(x), read(params), {}, {}, dout.const_data_ptr(), dout.stride(0)};
  if (need_dx) io.dx = write(dx);
  if (need_dparams) io.dparams = write(dparams);
  Run on(x);
  kernels().gaussian_log_density_backward(k, io, on.launch());
  return {dx, dparams};
}

}  // namespace

void register_gaussian_log_density(StableLibrary& library) {
  library.impl("_gaussian_log_density_forward", TORCH_BOX(&gaussian_log_density_forward));
  library.impl("_gaussian_log_density_backward", TORCH_BOX(&gaussian_log_density_backward));
}

}  // namespace nf
