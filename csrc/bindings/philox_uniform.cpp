// The raw op of Philox uniforms; its schema is defined in nfkernels/ops/philox_uniform.py.

#include "../include/kernels.h"
#include "random.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

Tensor philox_uniform_forward(Tensor like, Tensor key) {
  check_shape(like.dim() >= 2, "like must be [B, C, ...]");
  check_shape(like.scalar_type() == ScalarType::Float || like.scalar_type() == ScalarType::Double,
              "uniform numbers are float32 or float64");
  Tensor y = torch::stable::empty_like(like);
  const PhiloxUniform k{dtype_of(y), y.size(0), y.size(1), positions_of(y), write(y), checked_key(like, key)};
  Run on(like);
  kernels().philox_uniform_forward(k, on.launch());
  return y;
}

}  // namespace

void register_philox_uniform(StableLibrary& library) {
  library.impl("_philox_uniform_forward", TORCH_BOX(&philox_uniform_forward));
}

}  // namespace nf
