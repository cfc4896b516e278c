// Checks of the matrices and biases that mixes take.
#pragma once

#include "tensors.h"

namespace nf {

inline void check_matrix(const Tensor& x, const Tensor& matrix) {
  check_shape(x.dim() >= 2 && matrix.dim() == 2 && matrix.size(0) == x.size(1) && matrix.size(1) == x.size(1),
              "weight must be [C, C] for x of C channels");
  check_shape(matrix.scalar_type() == compute_type(x) && matrix.is_contiguous(),
              "weight must be contiguous, in the arithmetic's type");
  check_device(x, matrix);
}

inline void check_bias(const Tensor& x, const OptionalTensor& bias) {
  if (!bias) return;
  check_shape(bias->scalar_type() == compute_type(x) && bias->numel() == x.size(1) && bias->is_contiguous(),
              "bias must be contiguous [C], in the arithmetic's type");
  check_device(x, *bias);
}

}  // namespace nf
