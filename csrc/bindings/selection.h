// Which elements an op transforms: its channel map and its mask, shapes checked.
#pragma once

#include "tensors.h"

namespace nf {

inline const int64_t* channel_map_of(const Tensor& x, const OptionalTensor& channel_map) {
  if (!channel_map) return nullptr;
  check_shape(channel_map->scalar_type() == ScalarType::Long && channel_map->dim() == 1 &&
                  channel_map->size(0) == x.size(1) && channel_map->is_contiguous(),
              "channel_map must be int64 [C]");
  check_device(x, *channel_map);
  return static_cast<const int64_t*>(channel_map->const_data_ptr());
}

inline View mask_of(const Tensor& x, const OptionalTensor& mask) {
  if (!mask) return {};
  check_shape(mask->scalar_type() == ScalarType::Bool && mask->dim() == x.dim() &&
                  positions_of(*mask) == positions_of(x) && (mask->size(0) == 1 || mask->size(0) == x.size(0)) &&
                  (mask->size(1) == 1 || mask->size(1) == x.size(1)),
              "mask must be bool [B or 1, C or 1, ...] with x's positions");
  check_device(x, *mask);
  View v = read(*mask);
  if (mask->size(0) == 1) v.b = 0;
  if (mask->size(1) == 1) v.c = 0;
  return v;
}

}  // namespace nf
