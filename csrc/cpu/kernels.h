// The CPU kernels, compiled once per instruction set (namespace NF_ISA) and chosen at run time (isa.cpp).
#pragma once

#include "../include/affine_coupling.h"
#include "../include/channel_mix.h"

namespace nf {

struct CpuKernels {
  const char* isa;
  void (*affine_coupling_forward)(const Coupling&, const CouplingForward&, Parallel);
  void (*affine_coupling_backward)(const Coupling&, const CouplingBackward&, Parallel);
  void (*channel_mix_forward)(const MixForward&, Parallel);
  void (*channel_mix_backward)(const MixBackward&, Parallel);
  // For tests: applies one elementary function to n floats.
  void (*elementary)(int which, const float* x, float* y, int64_t n);
};

// The best set this processor runs, or the one NFKERNELS_CPU_ISA names.
const CpuKernels& cpu_kernels();

}  // namespace nf
