// Which of a spline's kernels serves a call. Host code.
#pragma once

#include "rational_quadratic_spline_math.h"

namespace nf {
namespace cuda {
namespace {

template <DType r, int k, bool p>
struct SplineKind {
  static constexpr DType raw = r;
  static constexpr int bins = k;
  static constexpr bool planes = p;
};

// Blocks that a multiprocessor's registers must do for.
template <DType R, int K, bool planes, bool backward>
constexpr int kSplineBlocks = R == DType::f64 || (backward && K > 10) ? 4
                              : backward && K > 0                     ? (K > 8 || planes ? 5 : 6)
                              : backward                              ? 7
                              : K > 8                                 ? 6
                                                                      : 8;

// Calls f(SplineKind<..>, plan): numbers of bins that are common have kernels of their own.
template <typename F>
void with_kernel(const SplineForm& k, const View& params, F&& f) {
  const DType stored = k.data == DType::f64 ? DType::f64 : k.raw;
  const SplinePlan plan = plan_spline(k, params, stored, k.data == DType::f64 ? 8 : 4);
  const auto with_bins = [&](auto raw, auto bins) {
    if (plan.planes)
      f(SplineKind<decltype(raw)::value, decltype(bins)::value, true>{}, plan);
    else
      f(SplineKind<decltype(raw)::value, decltype(bins)::value, false>{}, plan);
  };
  using F32 = std::integral_constant<DType, DType::f32>;
  using F64 = std::integral_constant<DType, DType::f64>;
  using BF16 = std::integral_constant<DType, DType::bf16>;
  using F16 = std::integral_constant<DType, DType::f16>;
  using Any = std::integral_constant<int, 0>;
  using Eight = std::integral_constant<int, 8>;
  using Ten = std::integral_constant<int, 10>;
  using Sixteen = std::integral_constant<int, 16>;
  if (stored == DType::f64) return with_bins(F64{}, Any{});
  if (stored == DType::f16) return with_bins(F16{}, Any{});
  if (stored == DType::bf16) return k.bins == 8 ? with_bins(BF16{}, Eight{}) : with_bins(BF16{}, Any{});
  switch (k.bins) {
    case 8:
      return with_bins(F32{}, Eight{});
    case 10:
      return with_bins(F32{}, Ten{});
    case 16:
      return with_bins(F32{}, Sixteen{});
    default:
      return with_bins(F32{}, Any{});
  }
}

}  // namespace
}  // namespace cuda
}  // namespace nf
