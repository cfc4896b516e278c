// The raw channel affine ops; schemas are defined in nfkernels/ops/channel_affine.py. On the CPU alone.
#ifndef NF_CUDA

#include <vector>

#include "../include/cpu_kernels.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

const void* vector_of(const Tensor& x, const Tensor& v) {
  check_shape(v.dim() == 1 && v.size(0) == x.size(1) && v.scalar_type() == compute_type(x) && v.is_contiguous(),
              "scale and shift must be contiguous [C], in the arithmetic's type");
  check_device(x, v);
  return v.const_data_ptr();
}

ChannelAffine affine_of(const Tensor& x, const OptionalTensor& order, const Tensor& scale) {
  check_shape(x.dim() >= 2, "x must be [B, C, ...]");
  ChannelAffine k{dtype_of(x), x.size(0), x.size(1), positions_of(x), read(x), nullptr, vector_of(x, scale)};
  if (!order) return k;
  check_shape(order->dim() == 1 && order->size(0) == k.channels && order->scalar_type() == ScalarType::Long &&
                  order->is_contiguous(),
              "order must be contiguous int64 [C]");
  check_device(x, *order);
  k.order = static_cast<const int64_t*>(order->const_data_ptr());
  std::vector<bool> seen(k.channels);
  for (int64_t i = 0; i < k.channels; ++i) {
    const int64_t c = k.order[i];
    check_shape(c >= 0 && c < k.channels && !seen[c], "order must be a permutation of the channels");
    seen[c] = true;
  }
  return k;
}

Tensor channel_affine_forward(Tensor x, Tensor scale, Tensor shift, OptionalTensor order) {
  Tensor y = torch::stable::empty_like(x);
  const ChannelAffineForward io{affine_of(x, order, scale), write(y), vector_of(x, shift)};
  Run on(x);
  cpu_kernels().channel_affine_forward(io, on.launch());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> channel_affine_backward(Tensor x, Tensor dy, Tensor scale, OptionalTensor order) {
  check_shape(dy.scalar_type() == x.scalar_type() && dy.numel() == x.numel(), "dy must be like x");
  check_device(x, dy);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dscale = torch::stable::empty_like(scale), dshift = torch::stable::empty_like(scale);
  const ChannelAffineBackward io{affine_of(x, order, scale), read(dy), write(dx), dscale.mutable_data_ptr(),
                                 dshift.mutable_data_ptr()};
  Run on(x);
  cpu_kernels().channel_affine_backward(io, on.launch());
  return {dx, dscale, dshift};
}

}  // namespace

void register_channel_affine(StableLibrary& library) {
  library.impl("_channel_affine_forward", TORCH_BOX(&channel_affine_forward));
  library.impl("_channel_affine_backward", TORCH_BOX(&channel_affine_backward));
}

}  // namespace nf

#endif
