// The raw LU composition ops; schemas are defined in nfkernels/ops/lu_compose.py.

#include "../include/kernels.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

void check_like(const Tensor& lower, const Tensor& other, int64_t dimensions, const char* what) {
  bool same = other.dim() == dimensions && other.is_contiguous() && other.scalar_type() == lower.scalar_type();
  for (int64_t i = 0; same && i < dimensions; ++i) same = other.size(i) == lower.size(i);
  check_shape(same, what);
  check_device(lower, other);
}

void check_like(const Tensor& lower, const OptionalTensor& other, int64_t dimensions, const char* what) {
  if (other) check_like(lower, *other, dimensions, what);
}

LUFactors factors(const Tensor& lower, const Tensor& upper, const Tensor& log_s, const OptionalTensor& sign,
                  const OptionalTensor& permutation, int64_t diagonal, double eps) {
  check_shape(lower.dim() == 3 && lower.size(1) == lower.size(2) && lower.is_contiguous(),
              "lower must be contiguous [K, C, C]");
  check_shape(lower.scalar_type() == ScalarType::Float || lower.scalar_type() == ScalarType::Double,
              "lower must be float32 or float64");
  check_like(lower, upper, 3, "upper must be like lower");
  check_like(lower, log_s, 2, "log_s must be contiguous [K, C], in lower's type");
  check_like(lower, sign, 2, "sign must be contiguous [K, C], in lower's type");
  if (permutation) {
    check_shape(permutation->scalar_type() == ScalarType::Long && permutation->is_contiguous() &&
                    permutation->dim() == 2 && permutation->size(0) == lower.size(0) &&
                    permutation->size(1) == lower.size(1),
                "permutation must be contiguous int64 [K, C]");
    check_device(lower, *permutation);
#ifndef NF_CUDA
    const auto* rows = static_cast<const int64_t*>(permutation->const_data_ptr());
    for (int64_t i = 0; i < permutation->numel(); ++i)
      check_shape(rows[i] >= 0 && rows[i] < lower.size(1), "permutation has an index outside of 0 .. C-1");
#endif
  }
  check_shape(diagonal == 0 || diagonal == 1, "diagonal must be 0 (exp) or 1 (softplus)");
  return {dtype_of(lower),
          lower.size(0),
          lower.size(1),
          lower.const_data_ptr(),
          upper.const_data_ptr(),
          log_s.const_data_ptr(),
          data_of(sign),
          static_cast<const int64_t*>(data_of(permutation)),
          static_cast<Diagonal>(diagonal),
          eps};
}

std::tuple<Tensor, Tensor, Tensor> lu_compose_forward(Tensor lower, Tensor upper, Tensor log_s, OptionalTensor sign,
                                                      OptionalTensor permutation, int64_t diagonal, double eps,
                                                      bool need_weight, bool need_inverse) {
  LUComposeForward io{};
  io.lu = factors(lower, upper, log_s, sign, permutation, diagonal, eps);
  const ScalarType type = lower.scalar_type();
  Tensor weight = need_weight ? torch::stable::empty_like(lower) : new_vector(lower, 0, type);
  Tensor inverse = need_inverse ? torch::stable::empty_like(lower) : new_vector(lower, 0, type);
  Tensor logdet = torch::stable::new_empty(lower, {}, type);
  if (need_weight) io.weight = weight.mutable_data_ptr();
  if (need_inverse) io.inverse = inverse.mutable_data_ptr();
  io.logdet = logdet.mutable_data_ptr();
  Run on(lower);
  kernels().lu_compose_forward(io, on.launch());
  return {weight, inverse, logdet};
}

std::tuple<Tensor, Tensor, Tensor> lu_compose_backward(Tensor lower, Tensor upper, Tensor log_s, OptionalTensor sign,
                                                       OptionalTensor permutation, OptionalTensor inverse,
                                                       OptionalTensor dweight, OptionalTensor dinverse,
                                                       OptionalTensor dlogdet, int64_t diagonal, double eps) {
  LUComposeBackward io{};
  io.lu = factors(lower, upper, log_s, sign, permutation, diagonal, eps);
  check_like(lower, inverse, 3, "inverse must be like lower");
  check_like(lower, dweight, 3, "dweight must be like lower");
  check_like(lower, dinverse, 3, "dinverse must be like lower");
  check_like(lower, dlogdet, 0, "dlogdet must be a scalar, in lower's type");
  check_shape(inverse.has_value() || !dinverse.has_value(), "a dinverse needs the inverse");
  Tensor dlower = torch::stable::empty_like(lower), dupper = torch::stable::empty_like(upper);
  Tensor dlog_s = torch::stable::empty_like(log_s);
  io.inverse = data_of(inverse);
  io.dweight = data_of(dweight);
  io.dinverse = data_of(dinverse);
  io.dlogdet = data_of(dlogdet);
  io.dlower = dlower.mutable_data_ptr();
  io.dupper = dupper.mutable_data_ptr();
  io.dlog_s = dlog_s.mutable_data_ptr();
  Run on(lower);
  kernels().lu_compose_backward(io, on.launch());
  return {dlower, dupper, dlog_s};
}

}  // namespace

void register_lu_compose(StableLibrary& library) {
  library.impl("_lu_compose_forward", TORCH_BOX(&lu_compose_forward));
  library.impl("_lu_compose_backward", TORCH_BOX(&lu_compose_backward));
}

}  // namespace nf
