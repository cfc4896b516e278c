// The CUDA kernels' table.

#include "../include/kernels.h"

namespace nf {
namespace cuda {

#define NF_WEAK __attribute__((weak))
NF_WEAK void affine_coupling_forward(const Coupling&, const CouplingForward&, const Launch&);
NF_WEAK void affine_coupling_backward(const Coupling&, const CouplingBackward&, const Launch&);
NF_WEAK void channel_mix_forward(const MixForward&, const Launch&);
NF_WEAK void channel_mix_backward(const MixBackward&, const Launch&);
NF_WEAK void gaussian_log_density_forward(const Gaussian&, const GaussianForward&, const Launch&);
NF_WEAK void gaussian_log_density_backward(const Gaussian&, const GaussianBackward&, const Launch&);
NF_WEAK void dequantize_forward(const DequantizeForward&, const Launch&);
NF_WEAK void dequantize_backward(const DequantizeBackward&, const Launch&);
NF_WEAK void philox_uniform_forward(const PhiloxUniform&, const Launch&);

}  // namespace cuda

const Kernels& kernels() {
  static const Kernels table = {
      cuda::affine_coupling_forward, cuda::affine_coupling_backward,     cuda::channel_mix_forward,
      cuda::channel_mix_backward,    cuda::gaussian_log_density_forward, cuda::gaussian_log_density_backward,
      cuda::dequantize_forward,      cuda::dequantize_backward,          cuda::philox_uniform_forward,
  };
  return table;
}

}  // namespace nf
