// The raw rational-quadratic spline ops; schemas are defined in nfkernels/ops/rational_quadratic_spline.py.

#include "../include/rational_quadratic_spline.h"

#include <vector>

#include "../include/kernels.h"
#include "register.h"
#include "run.h"
#include "selection.h"

namespace nf {
namespace {

SplineForm form_of(const Tensor& x, const Tensor& params, const OptionalTensor& channel_map, const OptionalTensor& mask,
                   int64_t bins, int64_t bits, const SplineNumbers& numbers) {
  SplineForm k{};
  check_shape(bins >= 2 && bins <= kSplineMostBins && (bits & 3) < 3, "a spline has 2 to 64 bins");
  unpack_form(k, bins, bits);
  k.numbers = numbers;
  check_shape(x.dim() >= 2 && params.dim() == x.dim() && params.size(0) == x.size(0),
              "x and params must be [B, C, ...]");
  check_device(x, params);
  k.data = dtype_of(x);
  k.raw = dtype_of(params);
  check_shape(k.raw != DType::f64 || k.data == DType::f64, "params may be narrower than x, not wider");
  k.batch = x.size(0);
  k.channels = x.size(1);
  k.positions = positions_of(x);
  check_shape(positions_of(params) == k.positions, "x and params differ in their positions");
  k.transformed = params.size(1) / k.count();
  check_shape(params.size(1) == k.transformed * k.count(), "params must have whole splines of channels");
  check_shape(channel_map || k.transformed == k.channels, "params must have a spline for every channel of x");
  k.channel_map = channel_map_of(x, channel_map);
  k.mask = mask_of(x, mask);
  return k;
}

// Whether the map names every channel of params exactly once. On a GPU nobody looks: false.
bool names_each_once(const SplineForm& k) {
#ifdef NF_CUDA
  return false;
#else
  std::vector<char> named(k.transformed, 0);
  int64_t count = 0;
  for (int64_t c = 0; c < k.channels; ++c) {
    const int64_t j = k.source(c);
    if (j < 0) continue;
    if (named[j]) return false;
    named[j] = 1;
    ++count;
  }
  return count == k.transformed;
#endif
}

std::tuple<Tensor, Tensor> rational_quadratic_spline_forward(Tensor x, Tensor params, OptionalTensor channel_map,
                                                             OptionalTensor mask, OptionalTensor logdet, int64_t bins,
                                                             int64_t form, double low, double high, double bottom,
                                                             double top, double min_width, double min_height,
                                                             double min_derivative, double clip, double prescale) {
  const SplineForm k = form_of(x, params, channel_map, mask, bins, form,
                               {low, high, bottom, top, min_width, min_height, min_derivative, clip, prescale});
  Tensor y = torch::stable::empty_like(x);
  Tensor total = k.elementwise ? empty_like(x, compute_type(x)) : new_vector(x, k.batch, compute_type(x));
  SplineForward io{};
  io.x = read(x);
  io.params = read(params);
  io.y = write(y);
  if (k.elementwise)
    io.each = write(total);
  else
    io.logdet = total.mutable_data_ptr();
  if (logdet) {
    check_shape(
        !k.elementwise && logdet->scalar_type() == compute_type(x) && logdet->dim() == 1 && logdet->size(0) == k.batch,
        "logdet must be [B]");
    check_device(x, *logdet);
    io.logdet_in = logdet->const_data_ptr();
    io.logdet_in_stride = logdet->stride(0);
  }
  Run on(x);
  kernels().rational_quadratic_spline_forward(k, io, on.launch());
  return {y, total};
}

std::tuple<Tensor, Tensor> rational_quadratic_spline_backward(
    Tensor x, Tensor params, OptionalTensor dy, OptionalTensor dlogdet, OptionalTensor channel_map, OptionalTensor mask,
    int64_t bins, int64_t form, double low, double high, double bottom, double top, double min_width, double min_height,
    double min_derivative, double clip, double prescale, bool need_dx, bool need_dparams) {
  const SplineForm k = form_of(x, params, channel_map, mask, bins, form,
                               {low, high, bottom, top, min_width, min_height, min_derivative, clip, prescale});
  Tensor dx = need_dx ? torch::stable::empty_like(x) : new_vector(x, 0, x.scalar_type());
  Tensor dparams = need_dparams ? torch::stable::empty_like(params) : new_vector(params, 0, params.scalar_type());
  // A map that names a params channel twice or never is the caller's error; it must not show uninitialised memory.
  if (need_dparams && k.channel_map && !names_each_once(k)) torch::stable::zero_(dparams);
  SplineBackward io{};
  io.x = read(x);
  io.params = read(params);
  if (need_dx) io.dx = write(dx);
  if (need_dparams) io.dparams = write(dparams);
  if (dy) {
    check_shape(dy->scalar_type() == x.scalar_type() && dy->dim() == x.dim() && dy->numel() == x.numel(),
                "dy must be like x");
    check_device(x, *dy);
    io.dy = read(*dy);
  }
  if (dlogdet) {
    check_shape(dlogdet->scalar_type() == compute_type(x) && dlogdet->dim() == (k.elementwise ? x.dim() : 1) &&
                    dlogdet->numel() == (k.elementwise ? x.numel() : k.batch),
                "dlogdet must be [B], or elementwise like x");
    check_device(x, *dlogdet);
    if (k.elementwise)
      io.dlogdet = read(*dlogdet);
    else
      io.dlogdet = {const_cast<void*>(dlogdet->const_data_ptr()), dlogdet->stride(0), 0, 0};
  }
  Run on(x);
  kernels().rational_quadratic_spline_backward(k, io, on.launch());
  return {dx, dparams};
}

}  // namespace

void register_rational_quadratic_spline(StableLibrary& library) {
  library.impl("_rational_quadratic_spline_forward", TORCH_BOX(&rational_quadratic_spline_forward));
  library.impl("_rational_quadratic_spline_backward", TORCH_BOX(&rational_quadratic_spline_backward));
}

}  // namespace nf
