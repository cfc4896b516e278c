// Splines for another op's kernel, whose raw values are in rows already. Defined in rational_quadratic_spline.cpp.
#pragma once

#include "../include/rational_quadratic_spline.h"
#include "isa.h"

namespace nf {
namespace NF_ISA {

constexpr int kSplineRow = 64;  // elements from a raw value to the next

// x becomes y, for n elements, a multiple of 16 and at most kSplineRow. powers: room for 2 bins rows.
void spline_rows(const SplineForm& k, float* raw, float* powers, float* x, float* log, int n);
void spline_rows(const SplineForm& k, double* raw, double* powers, double* x, double* log, int n);

}  // namespace NF_ISA
}  // namespace nf
