// The CPU implementations of the raw ops: shapes checked again (a raw op can be called by anyone), outputs allocated,
// kernels called. Schemas are defined in nfkernels/ops/*.py.

#include "../cpu/kernels.h"
#include "tensors.h"

namespace nf {
namespace {

void run_parallel(int64_t n, int64_t grain, void* ctx, Body body) {
  if (n <= grain) {
    body(ctx, 0, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
}

// --- affine coupling -------------------------------------------------------------------------------------------------

Coupling coupling_of(const Tensor& x, const Tensor& params, const OptionalTensor& channel_map,
                     const OptionalTensor& mask, const OptionalTensor& gain, int64_t form,
                     const ScaleMapConstants& constants) {
  Coupling k{};
  unpack_form(k, form);
  k.constants = constants;
  check_shape(x.dim() >= 2 && params.dim() == x.dim() && params.size(0) == x.size(0),
              "x and params must be [B, C, ...]");
  k.data = dtype_of(x);
  k.raw = dtype_of(params);
  k.batch = x.size(0);
  k.channels = x.size(1);
  k.positions = positions_of(x);
  check_shape(positions_of(params) == k.positions, "x and params differ in their positions");
  k.transformed = params.size(1) / (k.has_scale() ? 2 : 1);
  check_shape(k.transformed <= k.channels, "params have more channels than x can use");
  k.first = (form >> 7 & 3) == 1 ? k.channels - k.transformed : 0;
  if (channel_map) {
    check_shape(channel_map->scalar_type() == ScalarType::Long && channel_map->dim() == 1 &&
                    channel_map->size(0) == k.channels && channel_map->is_contiguous(),
                "channel_map must be int64 [C]");
    k.channel_map = static_cast<const int64_t*>(channel_map->const_data_ptr());
  }
  if (mask) {
    check_shape(mask->scalar_type() == ScalarType::Bool && mask->dim() == x.dim() &&
                    positions_of(*mask) == k.positions && (mask->size(0) == 1 || mask->size(0) == k.batch) &&
                    (mask->size(1) == 1 || mask->size(1) == k.channels),
                "mask must be bool [B or 1, C or 1, ...] with x's positions");
    k.mask = read(*mask);
    if (mask->size(0) == 1) k.mask.b = 0;
    if (mask->size(1) == 1) k.mask.c = 0;
  }
  if (gain) {
    check_shape(gain->scalar_type() == compute_type(x) && gain->numel() == k.transformed && gain->is_contiguous(),
                "gain must be [Ct] in the arithmetic's type");
    k.gain = gain->const_data_ptr();
  }
  return k;
}

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
    io.logdet_in_stride = logdet->stride(0);
  }
  cpu_kernels().affine_coupling_forward(k, io, run_parallel);
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(Tensor y, Tensor params, OptionalTensor dy,
                                                            OptionalTensor dlogdet, OptionalTensor channel_map,
                                                            OptionalTensor mask, OptionalTensor gain, int64_t form,
                                                            double prescale, double offset, double gain_factor,
                                                            double clamp, double eps) {
  const Coupling k = coupling_of(y, params, channel_map, mask, gain, form, {prescale, offset, gain_factor, clamp, eps});
  Tensor dx = torch::stable::empty_like(y);
  Tensor dparams = torch::stable::empty_like(params);
  // A map that names a params channel twice or never is the caller's error; it must not show uninitialised memory.
  if (channel_map) torch::stable::zero_(dparams);
  Tensor dgain = new_vector(y, gain ? k.transformed : 0, compute_type(y));
  CouplingBackward io{};
  io.y = read(y);
  io.params = read(params);
  io.dx = write(dx);
  io.dparams = write(dparams);
  if (dy) {
    check_shape(dy->scalar_type() == y.scalar_type() && dy->numel() == y.numel(), "dy must be like y");
    io.dy = read(*dy);
  }
  if (dlogdet) {
    check_shape(dlogdet->scalar_type() == compute_type(y) && dlogdet->numel() == k.batch, "dlogdet must be [B]");
    io.dlogdet = dlogdet->const_data_ptr();
    io.dlogdet_stride = dlogdet->stride(0);
  }
  io.dgain = gain ? dgain.mutable_data_ptr() : nullptr;
  cpu_kernels().affine_coupling_backward(k, io, run_parallel);
  return {dx, dparams, dgain};
}

// --- channel mix -----------------------------------------------------------------------------------------------------

void check_weight(const Tensor& x, const Tensor& weight) {
  check_shape(x.dim() >= 2 && weight.dim() == 2 && weight.size(0) == x.size(1) && weight.size(1) == x.size(1),
              "weight must be [C, C] for x of C channels");
  check_shape(weight.scalar_type() == compute_type(x) && weight.is_contiguous(),
              "weight must be contiguous, in the arithmetic's type");
}

Tensor channel_mix_forward(Tensor x, Tensor weight, OptionalTensor bias) {
  check_weight(x, weight);
  if (bias)
    check_shape(bias->scalar_type() == compute_type(x) && bias->numel() == x.size(1) && bias->is_contiguous(),
                "bias must be contiguous [C], in the arithmetic's type");
  Tensor y = torch::stable::empty_like(x);
  const MixForward io{dtype_of(x),  x.size(0), x.size(1), positions_of(x), read(x), write(y), weight.const_data_ptr(),
                      data_of(bias)};
  cpu_kernels().channel_mix_forward(io, run_parallel);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> channel_mix_backward(Tensor x, Tensor weight, Tensor dy, bool need_dx,
                                                        bool need_dweight, bool need_dbias) {
  check_weight(x, weight);
  check_shape(dy.scalar_type() == x.scalar_type() && dy.numel() == x.numel(), "dy must be like x");
  const int64_t channels = x.size(1);
  Tensor dx = need_dx ? torch::stable::empty_like(x) : new_vector(x, 0, x.scalar_type());
  Tensor dweight = need_dweight ? torch::stable::empty_like(weight) : new_vector(weight, 0, weight.scalar_type());
  Tensor dbias = new_vector(weight, need_dbias ? channels : 0, weight.scalar_type());
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
  cpu_kernels().channel_mix_backward(io, run_parallel);
  return {dx, dweight, dbias};
}

}  // namespace

// Called from Python once the module's schema version has been found to match.
void register_cpu_ops() {
  using torch::stable::detail::StableLibrary;
  static StableLibrary library(StableLibrary::Kind::IMPL, "nfkernels", "CPU", __FILE__, __LINE__);
  library.impl("_affine_coupling_forward", TORCH_BOX(&affine_coupling_forward));
  library.impl("_affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
  library.impl("_channel_mix_forward", TORCH_BOX(&channel_mix_forward));
  library.impl("_channel_mix_backward", TORCH_BOX(&channel_mix_backward));
}

}  // namespace nf
