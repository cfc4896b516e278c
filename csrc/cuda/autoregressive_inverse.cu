// The inverse of a masked autoregressive layer on CUDA, its transform affine; splines are in their own file.

#include "autoregressive_inverse_kernel.h"
#include "autoregressive_inverse_spline.h"

namespace nf {
namespace cuda {
namespace {

template <typename T>
struct AffineRule {
  Formula<T> formula;
  int shift_at, scale_at;

  explicit AffineRule(const Coupling& k)
      : formula(k), shift_at(static_cast<int>(k.shift_offset(1))), scale_at(static_cast<int>(k.scale_offset(1))) {}

  template <typename Params>
  NF_DEVICE T operator()(T v, const Params& params, T& log) const {
    T value[1] = {v}, log_s[1];
    const T shift[1] = {params[shift_at]}, raw[1] = {params[scale_at]};
    const Gains<T, 1> gains{{T(1)}, {T(0)}};
    transform(formula, value, shift, raw, gains, log_s);
    log = log_s[0];
    return value[0];
  }
};

}  // namespace

void autoregressive_inverse_forward(const AutoregressiveInverse& k, const Launch& on) {
  if (k.batch == 0) return;
  if (k.spline.bins)
    autoregressive_inverse_spline(k, on);
  else
    k.data == DType::f64 ? run_inverse<double>(k, AffineRule<double>(k.affine), on)
                         : run_inverse<float>(k, AffineRule<float>(k.affine), on);
}

}  // namespace cuda
}  // namespace nf
