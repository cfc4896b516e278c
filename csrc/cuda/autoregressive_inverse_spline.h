// The autoregressive inverse whose transform is a spline, of at least one sample.
#pragma once

#include "../include/autoregressive_inverse.h"

namespace nf {
namespace cuda {

void autoregressive_inverse_spline(const AutoregressiveInverse& k, const Launch& on);

}  // namespace cuda
}  // namespace nf
