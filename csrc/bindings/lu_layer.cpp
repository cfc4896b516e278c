// The raw LU layer ops; schemas are defined in nfkernels/ops/lu_layer.py. On the CPU alone.
#ifndef NF_CUDA

#include "../include/cpu_kernels.h"
#include "mix.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

void check_vector(const Tensor& x, const OptionalTensor& v, ScalarType type, const char* what) {
  if (!v) return;
  check_shape(v->dim() == 1 && v->size(0) == x.size(1) && v->scalar_type() == type && v->is_contiguous(), what);
  check_device(x, *v);
}

bool is_packed(const Tensor& x, const Tensor& factor) {
  const int64_t n = x.size(1);
  const bool packed = factor.dim() == 1;
  check_shape(factor.scalar_type() == compute_type(x) && factor.is_contiguous() &&
                  (packed ? factor.size(0) == n * (n - 1) / 2
                          : factor.dim() == 2 && factor.size(0) == n && factor.size(1) == n),
              "a factor must be contiguous [C, C] or [C (C - 1) / 2], in the arithmetic's type");
  check_device(x, factor);
  return packed;
}

const int64_t* order_of(const Tensor& x, const OptionalTensor& order) {
  check_vector(x, order, ScalarType::Long, "permutation and columns must be contiguous int64 [C]");
  const auto* at = static_cast<const int64_t*>(data_of(order));
  for (int64_t i = 0; at && i < x.size(1); ++i)
    check_shape(at[i] >= 0 && at[i] < x.size(1), "permutation or columns has an index outside of 0 .. C-1");
  return at;
}

LUFactors factors(const Tensor& x, const Tensor& lower, const Tensor& upper, const Tensor& log_s,
                  const OptionalTensor& sign, const OptionalTensor& permutation, const OptionalTensor& columns,
                  int64_t diagonal, double eps) {
  check_vector(x, log_s, compute_type(x), "log_s must be contiguous [C], in the arithmetic's type");
  check_vector(x, sign, compute_type(x), "sign must be contiguous [C], in the arithmetic's type");
  check_shape(diagonal == 0 || diagonal == 1, "diagonal must be 0 (exp) or 1 (softplus)");
  return {dtype_of(log_s),
          1,
          x.size(1),
          lower.const_data_ptr(),
          upper.const_data_ptr(),
          log_s.const_data_ptr(),
          data_of(sign),
          order_of(x, permutation),
          static_cast<Diagonal>(diagonal),
          eps,
          order_of(x, columns)};
}

std::tuple<Tensor, Tensor> lu_layer_forward(Tensor x, Tensor lower, Tensor upper, Tensor log_s, OptionalTensor sign,
                                            OptionalTensor permutation, OptionalTensor columns, OptionalTensor bias,
                                            int64_t diagonal, double eps, bool inverse) {
  LULayerForward io{};
  io.lower_packed = is_packed(x, lower);
  io.upper_packed = is_packed(x, upper);
  io.linear.lu = factors(x, lower, upper, log_s, sign, permutation, columns, diagonal, eps);
  check_bias(x, bias);
  Tensor y = torch::stable::empty_like(x);
  Tensor logdet = new_vector(x, x.size(0), compute_type(x));
  io.linear.data = dtype_of(x);
  io.linear.batch = x.size(0);
  io.linear.positions = positions_of(x);
  io.linear.x = read(x);
  io.linear.y = write(y);
  io.linear.bias = data_of(bias);
  io.linear.inverse = inverse;
  io.logdet = logdet.mutable_data_ptr();
  Run on(x);
  cpu_kernels().lu_layer_forward(io, on.launch());
  return {y, logdet};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lu_layer_backward(Tensor dy, OptionalTensor dlogdet, Tensor saved,
                                                                     Tensor lower, Tensor upper, Tensor log_s,
                                                                     OptionalTensor sign, OptionalTensor permutation,
                                                                     OptionalTensor columns, int64_t diagonal,
                                                                     double eps, bool inverse, bool need_dx,
                                                                     bool need_dparams, bool need_dbias) {
  LULayerBackward io{};
  io.lower_packed = is_packed(saved, lower);
  io.upper_packed = is_packed(saved, upper);
  io.linear.lu = factors(saved, lower, upper, log_s, sign, permutation, columns, diagonal, eps);
  check_shape(dy.scalar_type() == saved.scalar_type() && dy.numel() == saved.numel(), "dy must be like the saved x");
  check_device(saved, dy);
  const ScalarType type = log_s.scalar_type();
  const auto made = [&](const Tensor& like) {
    return need_dparams ? torch::stable::empty_like(like) : new_vector(like, 0, type);
  };
  Tensor dx = need_dx ? torch::stable::empty_like(saved) : new_vector(saved, 0, saved.scalar_type());
  Tensor dlower = made(lower), dupper = made(upper), dlog_s = made(log_s);
  Tensor dbias = new_vector(lower, need_dbias ? saved.size(1) : 0, type);
  io.linear.data = dtype_of(saved);
  io.linear.batch = saved.size(0);
  io.linear.positions = positions_of(saved);
  io.linear.dy = read(dy);
  io.linear.x = read(saved);
  if (need_dx) io.linear.dx = write(dx);
  if (need_dparams) {
    io.linear.dlower = dlower.mutable_data_ptr();
    io.linear.dupper = dupper.mutable_data_ptr();
    io.linear.dlog_s = dlog_s.mutable_data_ptr();
  }
  io.linear.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
  io.linear.inverse = inverse;
  if (dlogdet) {
    check_shape(dlogdet->dim() == 1 && dlogdet->size(0) == saved.size(0) && dlogdet->scalar_type() == type,
                "dlogdet must be [B], in the arithmetic's type");
    check_device(saved, *dlogdet);
    io.dlogdet = dlogdet->const_data_ptr();
    io.dlogdet_stride = dlogdet->stride(0);
  }
  Run on(saved);
  cpu_kernels().lu_layer_backward(io, on.launch());
  return {dx, dlower, dupper, dlog_s, dbias};
}

}  // namespace

void register_lu_layer(StableLibrary& library) {
  library.impl("_lu_layer_forward", TORCH_BOX(&lu_layer_forward));
  library.impl("_lu_layer_backward", TORCH_BOX(&lu_layer_backward));
}

}  // namespace nf

#endif
