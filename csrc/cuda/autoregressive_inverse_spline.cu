// The inverse of a masked autoregressive layer on CUDA, its transform a rational-quadratic spline.

#include "autoregressive_inverse_kernel.h"
#include "autoregressive_inverse_spline.h"
#include "rational_quadratic_spline_math.h"

namespace nf {
namespace cuda {
namespace {

template <typename T>
struct SplineRule {
  SplineRules<T> rules;

  explicit SplineRule(const SplineForm& k) : rules(k) {}

  template <typename Params>
  NF_DEVICE T operator()(T v, const Params& params, T& log) const {
    const SplineValue<T> out = transform_element<0>(v, params, rules);
    log = out.log;
    return out.value;
  }
};

}  // namespace

void autoregressive_inverse_spline(const AutoregressiveInverse& k, const Launch& on) {
  k.data == DType::f64 ? run_inverse<double>(k, SplineRule<double>(k.spline), on)
                       : run_inverse<float>(k, SplineRule<float>(k.spline), on);
}

}  // namespace cuda
}  // namespace nf
