// The raw LU linear ops; schemas are defined in nfkernels/ops/lu_linear.py.

#include "../include/kernels.h"
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

LUFactors factors(const Tensor& x, const Tensor& lower, const Tensor& upper, const Tensor& log_s,
                  const OptionalTensor& sign, const OptionalTensor& permutation, int64_t diagonal, double eps) {
  check_matrix(x, lower);
  check_matrix(x, upper);
  check_vector(x, log_s, compute_type(x), "log_s must be contiguous [C], in the arithmetic's type");
  check_vector(x, sign, compute_type(x), "sign must be contiguous [C], in the arithmetic's type");
  check_vector(x, permutation, ScalarType::Long, "permutation must be contiguous int64 [C]");
  check_shape(diagonal == 0 || diagonal == 1, "diagonal must be 0 (exp) or 1 (softplus)");
  const auto* rows = static_cast<const int64_t*>(data_of(permutation));
#ifndef NF_CUDA
  for (int64_t i = 0; rows && i < x.size(1); ++i)
    check_shape(rows[i] >= 0 && rows[i] < x.size(1), "permutation has an index outside of 0 .. C-1");
#endif
  return {dtype_of(lower),
          1,
          x.size(1),
          lower.const_data_ptr(),
          upper.const_data_ptr(),
          log_s.const_data_ptr(),
          data_of(sign),
          rows,
          static_cast<Diagonal>(diagonal),
          eps};
}

Tensor lu_linear_forward(Tensor x, Tensor lower, Tensor upper, Tensor log_s, OptionalTensor sign,
                         OptionalTensor permutation, OptionalTensor bias, int64_t diagonal, double eps, bool inverse) {
  LULinearForward io{};
  io.lu = factors(x, lower, upper, log_s, sign, permutation, diagonal, eps);
  check_bias(x, bias);
  Tensor y = torch::stable::empty_like(x);
  io.data = dtype_of(x);
  io.batch = x.size(0);
  io.positions = positions_of(x);
  io.x = read(x);
  io.y = write(y);
  io.bias = data_of(bias);
  io.inverse = inverse;
  Run on(x);
  kernels().lu_linear_forward(io, on.launch());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lu_linear_backward(Tensor dy, Tensor saved, Tensor lower,
                                                                      Tensor upper, Tensor log_s, OptionalTensor sign,
                                                                      OptionalTensor permutation, int64_t diagonal,
                                                                      double eps, bool inverse, bool need_dx,
                                                                      bool need_dparams, bool need_dbias) {
  LULinearBackward io{};
  io.lu = factors(saved, lower, upper, log_s, sign, permutation, diagonal, eps);
  check_shape(dy.scalar_type() == saved.scalar_type() && dy.numel() == saved.numel(), "dy must be like the saved x");
  check_device(saved, dy);
  const ScalarType type = lower.scalar_type();
  const auto made = [&](const Tensor& like) {
    return need_dparams ? torch::stable::empty_like(like) : new_vector(like, 0, type);
  };
  Tensor dx = need_dx ? torch::stable::empty_like(saved) : new_vector(saved, 0, saved.scalar_type());
  Tensor dlower = made(lower), dupper = made(upper), dlog_s = made(log_s);
  Tensor dbias = new_vector(lower, need_dbias ? saved.size(1) : 0, type);
  io.data = dtype_of(saved);
  io.batch = saved.size(0);
  io.positions = positions_of(saved);
  io.dy = read(dy);
  io.x = read(saved);
  if (need_dx) io.dx = write(dx);
  if (need_dparams) {
    io.dlower = dlower.mutable_data_ptr();
    io.dupper = dupper.mutable_data_ptr();
    io.dlog_s = dlog_s.mutable_data_ptr();
  }
  io.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
  io.inverse = inverse;
  Run on(saved);
  kernels().lu_linear_backward(io, on.launch());
  return {dx, dlower, dupper, dlog_s, dbias};
}

}  // namespace

void register_lu_linear(StableLibrary& library) {
  library.impl("_lu_linear_forward", TORCH_BOX(&lu_linear_forward));
  library.impl("_lu_linear_backward", TORCH_BOX(&lu_linear_backward));
}

}  // namespace nf
