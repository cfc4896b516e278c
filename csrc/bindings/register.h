// Every op's implementations, registered on one dispatch key: CPU from nfkernels._C, CUDA from nfkernels._C_cuda.
#pragma once

#include <torch/csrc/stable/library.h>

// The files here that hold an op's binding.
#define NF_OPS(OP)           \
  OP(affine_coupling)        \
  OP(autoregressive_conv)    \
  OP(autoregressive_inverse) \
  OP(channel_mix)            \
  OP(coupling_mix)           \
  OP(dequantize)             \
  OP(gaussian_log_density)   \
  OP(lu_compose)             \
  OP(lu_linear)              \
  OP(philox_uniform)         \
  OP(rational_quadratic_spline)

// Those of ops that the CPU alone has kernels for: they are empty in nfkernels._C_cuda.
#define NF_CPU_OPS(OP) \
  OP(channel_affine)   \
  OP(dense_net)        \
  OP(lu_layer)

namespace nf {

using torch::stable::detail::StableLibrary;

#define NF_DECLARE_REGISTER(op) void register_##op(StableLibrary&);
NF_OPS(NF_DECLARE_REGISTER)
NF_CPU_OPS(NF_DECLARE_REGISTER)

// Called from Python once the module's schema version has been found to match.
inline void register_ops(const char* key) {
  static StableLibrary library(StableLibrary::Kind::IMPL, "nfkernels", key, __FILE__, __LINE__);
#define NF_REGISTER(op) register_##op(library);
  NF_OPS(NF_REGISTER)
#ifndef NF_CUDA
  NF_CPU_OPS(NF_REGISTER)
#endif
}

}  // namespace nf
