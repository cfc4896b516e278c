// Every op's implementations, registered on one dispatch key: CPU from nfkernels._C, CUDA from nfkernels._C_cuda.
#pragma once

#include <torch/csrc/stable/library.h>

namespace nf {

using torch::stable::detail::StableLibrary;

void register_affine_coupling(StableLibrary&);
void register_channel_mix(StableLibrary&);
void register_gaussian_log_density(StableLibrary&);
void register_dequantize(StableLibrary&);
void register_philox_uniform(StableLibrary&);

// Called from Python once the module's schema version has been found to match.
inline void register_ops(const char* key) {
  static StableLibrary library(StableLibrary::Kind::IMPL, "nfkernels", key, __FILE__, __LINE__);
  register_affine_coupling(library);
  register_channel_mix(library);
  register_gaussian_log_density(library);
  register_dequantize(library);
  register_philox_uniform(library);
}

}  // namespace nf
