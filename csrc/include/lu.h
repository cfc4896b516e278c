// W = P (L + I) (U + diag(s)): the diagonal s from its raw parameter, to every kernel.
#pragma once

#include "scalar_math.h"
#include "types.h"

namespace nf {

// exp: s = sign exp(r), sign null for +1. softplus: s = log(1 + exp(r)) + eps (nflows), without a sign.
enum class Diagonal : int { exp = 0, softplus };

namespace {

// double whatever the data: C of them to a matrix of C^2.
NF_FN double diagonal_value(Diagonal form, double raw, double sign, double eps) {
  if (form == Diagonal::exp) return sign * std::exp(raw);
  return (raw > 0 ? raw : 0.0) + std::log1p(std::exp(-std::fabs(raw))) + eps;
}

// d s / d r.
NF_FN double diagonal_slope(Diagonal form, double raw, double value) {
  if (form == Diagonal::exp) return value;
  return raw > 0 ? 1.0 / (1.0 + std::exp(-raw)) : std::exp(raw) / (1.0 + std::exp(raw));
}

// log|s|, exact where s would overflow.
NF_FN double diagonal_log(Diagonal form, double raw, double value) {
  return form == Diagonal::exp ? raw : std::log(value);
}

}  // namespace
}  // namespace nf
