// The CPU kernels are compiled once per instruction set (namespace NF_ISA) and chosen at run time (isa.cpp).
#pragma once

#include "../include/kernels.h"

namespace nf {

struct Processor {
  const char* isa;
  void (*elementary)(int which, const float* x, float* y, int64_t n);  // tests: one elementary function on n floats
  Kernels kernels;
};

// The best set this processor runs, or the one NFKERNELS_CPU_ISA names.
const Processor& processor();

}  // namespace nf
