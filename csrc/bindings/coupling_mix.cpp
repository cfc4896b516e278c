// The raw ops of a coupling and the mix that follows it; schemas are defined in nfkernels/ops/coupling_mix.py.

#include "../include/kernels.h"
#include "coupling.h"
#include "mix.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

ScalarType scalar_type_of(int64_t type) {
  static const ScalarType table[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  check_shape(type >= 0 && type < 4, "unknown dtype of the extra output");
  return table[type];
}

// Row-major, as the kernels read it; linear algebra leaves its inverses column-major.
Tensor row_major(const Tensor& matrix) { return matrix.is_contiguous() ? matrix : torch::stable::contiguous(matrix); }

Coupling checked_coupling(const Tensor& x, const Tensor& params, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& gain, int64_t form, const ScaleMapConstants& constants) {
  const Coupling k = coupling_of(x, params, std::nullopt, std::nullopt, gain, form, constants);
  check_shape(k.channels <= kMixLimit, "coupling_mix serves at most 64 channels");
  check_matrix(x, weight);
  check_bias(x, bias);
  return k;
}

void check_extra(const Tensor& x, int64_t start, int64_t count) {
  check_shape(start >= 0 && count >= 0 && start + count <= x.size(1), "the extra channels are not among z's");
}

// [B, count, *spatial], its channels side by side in memory when `channels_last`.
Tensor new_extra(const Tensor& x, int64_t count, ScalarType type, bool channels_last) {
  std::vector<int64_t> shape;
  const int64_t axes = x.dim();
  for (int64_t i = 0; i < axes; ++i) shape.push_back(i == 1 ? count : x.size(i));
  if (!channels_last || axes == 2) return torch::stable::new_empty(x, shape, type);
  shape.erase(shape.begin() + 1);
  shape.push_back(count);
  Tensor extra = torch::stable::new_empty(x, shape, type);
  for (int64_t i = axes - 1; i > 1; --i) extra = torch::stable::transpose(extra, i, i - 1);
  return extra;
}

std::tuple<Tensor, Tensor, Tensor> coupling_mix_forward(Tensor x, Tensor params, Tensor weight, OptionalTensor bias,
                                                        OptionalTensor gain, OptionalTensor logdet, int64_t form,
                                                        double prescale, double offset, double gain_factor,
                                                        double clamp, double eps, int64_t extra_start,
                                                        int64_t extra_count, int64_t extra_dtype,
                                                        bool extra_channels_last) {
  weight = row_major(weight);
  const Coupling k = checked_coupling(x, params, weight, bias, gain, form, {prescale, offset, gain_factor, clamp, eps});
  check_extra(x, extra_start, extra_count);
  const ScalarType extra_type = scalar_type_of(extra_dtype);
  Tensor z = torch::stable::empty_like(x);
  Tensor total = new_vector(x, k.batch, compute_type(x));
  Tensor extra =
      extra_count > 0 ? new_extra(x, extra_count, extra_type, extra_channels_last) : new_vector(x, 0, extra_type);
  CouplingMixForward io{};
  io.x = read(x);
  io.params = read(params);
  io.z = write(z);
  io.weight = weight.const_data_ptr();
  io.bias = data_of(bias);
  io.logdet = total.mutable_data_ptr();
  if (logdet) {
    check_shape(logdet->scalar_type() == compute_type(x) && logdet->numel() == k.batch, "logdet must be [B]");
    check_device(x, *logdet);
    io.logdet_in = logdet->const_data_ptr();
    io.logdet_in_stride = logdet->stride(0);
  }
  if (extra_count > 0) io.extra = {write(extra), dtype_of(extra), extra_start, extra_count};
  Run on(x);
  kernels().coupling_mix_forward(k, io, on.launch());
  return {z, total, extra};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> coupling_mix_backward(
    Tensor z, Tensor params, Tensor weight, Tensor inverse, OptionalTensor bias, OptionalTensor dz,
    OptionalTensor dlogdet, OptionalTensor dextra, OptionalTensor gain, int64_t form, double prescale, double offset,
    double gain_factor, double clamp, double eps, int64_t extra_start, bool need_dweight, bool need_dbias,
    bool rebuild) {
  weight = row_major(weight);
  inverse = row_major(inverse);
  const Coupling k = checked_coupling(z, params, weight, bias, gain, form, {prescale, offset, gain_factor, clamp, eps});
  check_matrix(z, inverse);
  Tensor dx = torch::stable::empty_like(z);
  Tensor dparams = torch::stable::empty_like(params);
  Tensor dweight = need_dweight ? torch::stable::empty_like(weight) : new_vector(weight, 0, weight.scalar_type());
  Tensor dbias = new_vector(weight, need_dbias ? k.channels : 0, weight.scalar_type());
  Tensor dgain = new_vector(weight, gain ? k.transformed : 0, weight.scalar_type());
  Tensor x = rebuild ? torch::stable::empty_like(z) : new_vector(z, 0, z.scalar_type());
  CouplingMixBackward io{};
  io.z = read(z);
  io.params = read(params);
  io.dx = write(dx);
  io.dparams = write(dparams);
  io.weight = weight.const_data_ptr();
  io.inverse = inverse.const_data_ptr();
  io.bias = data_of(bias);
  if (dz) {
    check_shape(dz->scalar_type() == z.scalar_type() && dz->numel() == z.numel(), "dz must be like z");
    check_device(z, *dz);
    io.dz = read(*dz);
  }
  if (dlogdet) {
    check_shape(dlogdet->scalar_type() == compute_type(z) && dlogdet->numel() == k.batch, "dlogdet must be [B]");
    check_device(z, *dlogdet);
    io.dlogdet = dlogdet->const_data_ptr();
    io.dlogdet_stride = dlogdet->stride(0);
  }
  if (dextra) {
    check_shape(dextra->dim() == z.dim() && dextra->size(0) == k.batch && positions_of(*dextra) == k.positions,
                "dextra must be [B, count, ...] with z's positions");
    check_device(z, *dextra);
    check_extra(z, extra_start, dextra->size(1));
    if (dextra->size(1) > 0) io.dextra = {read(*dextra), dtype_of(*dextra), extra_start, dextra->size(1)};
  }
  if (rebuild) io.x = write(x);
  io.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
  io.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
  io.dgain = gain ? dgain.mutable_data_ptr() : nullptr;
  Run on(z);
  kernels().coupling_mix_backward(k, io, on.launch());
  return {dx, dparams, dweight, dbias, dgain, x};
}

}  // namespace

void register_coupling_mix(StableLibrary& library) {
  library.impl("_coupling_mix_forward", TORCH_BOX(&coupling_mix_forward));
  library.impl("_coupling_mix_backward", TORCH_BOX(&coupling_mix_backward));
}

}  // namespace nf
