// The kernels of one device, a pointer for each raw op. `kernels()` is the CPU's in nfkernels._C (cpu/isa.cpp) and the
// GPU's in nfkernels._C_cuda (cuda/kernels.cpp): the bindings are compiled once against each.
#pragma once

#include "affine_coupling.h"
#include "autoregressive_conv.h"
#include "autoregressive_inverse.h"
#include "channel_mix.h"
#include "coupling_mix.h"
#include "dequantize.h"
#include "gaussian_log_density.h"
#include "lu_compose.h"
#include "lu_linear.h"
#include "rational_quadratic_spline.h"

// Every raw op, with what its kernels take besides `const Launch&`.
#define NF_KERNELS(KERNEL)                                                           \
  KERNEL(affine_coupling_forward, const Coupling&, const CouplingForward&)           \
  KERNEL(affine_coupling_backward, const Coupling&, const CouplingBackward&)         \
  KERNEL(autoregressive_conv_forward, const AutoregressiveConv&)                     \
  KERNEL(autoregressive_inverse_forward, const AutoregressiveInverse&)               \
  KERNEL(channel_mix_forward, const MixForward&)                                     \
  KERNEL(channel_mix_backward, const MixBackward&)                                   \
  KERNEL(coupling_mix_forward, const Coupling&, const CouplingMixForward&)           \
  KERNEL(coupling_mix_backward, const Coupling&, const CouplingMixBackward&)         \
  KERNEL(gaussian_log_density_forward, const Gaussian&, const GaussianForward&)      \
  KERNEL(gaussian_log_density_backward, const Gaussian&, const GaussianBackward&)    \
  KERNEL(dequantize_forward, const DequantizeForward&)                               \
  KERNEL(dequantize_backward, const DequantizeBackward&)                             \
  KERNEL(lu_compose_forward, const LUComposeForward&)                                \
  KERNEL(lu_compose_backward, const LUComposeBackward&)                              \
  KERNEL(lu_linear_forward, const LULinearForward&)                                  \
  KERNEL(lu_linear_backward, const LULinearBackward&)                                \
  KERNEL(philox_uniform_forward, const PhiloxUniform&)                               \
  KERNEL(rational_quadratic_spline_forward, const SplineForm&, const SplineForward&) \
  KERNEL(rational_quadratic_spline_backward, const SplineForm&, const SplineBackward&)

namespace nf {

#define NF_DECLARE_KERNEL(name, ...) void name(__VA_ARGS__, const Launch&);
#define NF_KERNEL_POINTER(name, ...) void (*name)(__VA_ARGS__, const Launch&);

struct Kernels {
  NF_KERNELS(NF_KERNEL_POINTER)
};

const Kernels& kernels();

}  // namespace nf
