// Keys of random numbers, as every op that draws them takes them.
#pragma once

#include "tensors.h"

namespace nf {

// [seed, offset] where the kernel will read it: on the data's device.
inline const int64_t* checked_key(const Tensor& x, const Tensor& key) {
  check_shape(key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == 2 && key.is_contiguous(),
              "key must be int64 [seed, offset]");
  check_device(x, key);
  return static_cast<const int64_t*>(key.const_data_ptr());
}

}  // namespace nf
