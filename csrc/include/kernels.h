// The kernels of one device, a pointer for each raw op. `kernels()` is the CPU's in nfkernels._C (cpu/isa.cpp) and the
// GPU's in nfkernels._C_cuda (cuda/kernels.cpp): the bindings are compiled once against each.
#pragma once

#include "affine_coupling.h"
#include "channel_mix.h"
#include "dequantize.h"
#include "gaussian_log_density.h"

namespace nf {

struct Kernels {
  void (*affine_coupling_forward)(const Coupling&, const CouplingForward&, const Launch&);
  void (*affine_coupling_backward)(const Coupling&, const CouplingBackward&, const Launch&);
  void (*channel_mix_forward)(const MixForward&, const Launch&);
  void (*channel_mix_backward)(const MixBackward&, const Launch&);
  void (*gaussian_log_density_forward)(const Gaussian&, const GaussianForward&, const Launch&);
  void (*gaussian_log_density_backward)(const Gaussian&, const GaussianBackward&, const Launch&);
  void (*dequantize_forward)(const DequantizeForward&, const Launch&);
  void (*dequantize_backward)(const DequantizeBackward&, const Launch&);
  void (*philox_uniform_forward)(const PhiloxUniform&, const Launch&);
};

const Kernels& kernels();

}  // namespace nf
