// The raw dequantisation ops; schemas are defined in nfkernels/ops/dequantize.py.

#include <array>

#include "../include/kernels.h"
#include "random.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

// torch.empty_like(x, dtype=type), which the stable header has without a dtype only.
Tensor empty_like_as(const Tensor& x, ScalarType type) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(std::optional<ScalarType>(type)),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// `dtype` is an index of enum DType.
ScalarType scalar_type_of(int64_t dtype) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  check_shape(dtype >= 0 && dtype < 4, "dtype must be 0 (float32), 1 (float64), 2 (bfloat16) or 3 (float16)");
  return types[dtype];
}

std::tuple<Tensor, Tensor> dequantize_forward(Tensor x, Tensor key, OptionalTensor logdet, double levels, double alpha,
                                              int64_t dtype) {
  const ScalarType type = scalar_type_of(dtype);
  check_shape(x.dim() >= 2, "x must be [B, C, ...]");
  check_shape(x.scalar_type() == ScalarType::Byte || x.scalar_type() == type,
              "x must be uint8 or of the output's type");
  check_shape(levels > 0 && alpha < 0.5, "levels must be positive and alpha below 1/2");
  Tensor y = empty_like_as(x, type);
  Tensor total = new_vector(x, x.size(0), compute_type(y));
  DequantizeForward k{};
  k.bytes = x.scalar_type() == ScalarType::Byte;
  k.data = dtype_of(y);
  k.batch = x.size(0);
  k.channels = x.size(1);
  k.positions = positions_of(x);
  k.x = read(x);
  k.y = write(y);
  k.key = checked_key(x, key);
  if (logdet) {
    check_shape(logdet->scalar_type() == compute_type(y) && logdet->dim() == 1 && logdet->size(0) == k.batch,
                "logdet must be [B] in the arithmetic's type");
    check_device(x, *logdet);
    k.logdet_in = logdet->const_data_ptr();
    k.logdet_in_stride = logdet->stride(0);
  }
  k.logdet = total.mutable_data_ptr();
  k.levels = levels;
  k.alpha = alpha;
  Run on(x);
  kernels().dequantize_forward(k, on.launch());
  return {y, total};
}

Tensor dequantize_backward(Tensor y, OptionalTensor dy, OptionalTensor dlogdet, double levels, double alpha) {
  check_shape(y.dim() >= 2, "y must be [B, C, ...]");
  check_shape(levels > 0 && alpha < 0.5, "levels must be positive and alpha below 1/2");
  Tensor dx = torch::stable::empty_like(y);
  DequantizeBackward k{};
  k.data = dtype_of(y);
  k.batch = y.size(0);
  k.channels = y.size(1);
  k.positions = positions_of(y);
  k.y = read(y);
  k.dx = write(dx);
  if (dy) {
    check_shape(dy->scalar_type() == y.scalar_type() && dy->dim() == y.dim() && dy->numel() == y.numel(),
                "dy must be like y");
    check_device(y, *dy);
    k.dy = read(*dy);
  }
  if (dlogdet) {
    check_shape(dlogdet->scalar_type() == compute_type(y) && dlogdet->dim() == 1 && dlogdet->size(0) == k.batch,
                "dlogdet must be [B] in the arithmetic's type");
    check_device(y, *dlogdet);
    k.dlogdet = dlogdet->const_data_ptr();
    k.dlogdet_stride = dlogdet->stride(0);
  }
  k.levels = levels;
  k.alpha = alpha;
  Run on(y);
  kernels().dequantize_backward(k, on.launch());
  return dx;
}

}  // namespace

void register_dequantize(StableLibrary& library) {
  library.impl("_dequantize_forward", TORCH_BOX(&dequantize_forward));
  library.impl("_dequantize_backward", TORCH_BOX(&dequantize_backward));
}

}  // namespace nf
