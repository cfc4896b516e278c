// The coupling that a raw op's arguments describe, for every op that holds one; shapes checked.
#pragma once

#include "../include/affine_coupling.h"
#include "tensors.h"

namespace nf {

inline Coupling coupling_of(const Tensor& x, const Tensor& params, const OptionalTensor& channel_map,
                            const OptionalTensor& mask, const OptionalTensor& gain, int64_t form,
                            const ScaleMapConstants& constants) {
  Coupling k{};
  unpack_form(k, form);
  k.constants = constants;
  check_shape(x.dim() >= 2 && params.dim() == x.dim() && params.size(0) == x.size(0),
              "x and params must be [B, C, ...]");
  check_device(x, params);
  k.data = dtype_of(x);
  k.raw = dtype_of(params);
  k.batch = x.size(0);
  k.channels = x.size(1);
  k.positions = positions_of(x);
  check_shape(positions_of(params) == k.positions, "x and params differ in their positions");
  k.transformed = params.size(1) / (k.has_scale() ? 2 : 1);
  check_shape(k.transformed <= k.channels, "params have more channels than x can use");
  k.first = (form >> 7 & 3) == 1 ? k.channels - k.transformed : 0;
  if (channel_map) {
    check_shape(channel_map->scalar_type() == ScalarType::Long && channel_map->dim() == 1 &&
                    channel_map->size(0) == k.channels && channel_map->is_contiguous(),
                "channel_map must be int64 [C]");
    check_device(x, *channel_map);
    k.channel_map = static_cast<const int64_t*>(channel_map->const_data_ptr());
  }
  if (mask) {
    check_shape(mask->scalar_type() == ScalarType::Bool && mask->dim() == x.dim() &&
                    positions_of(*mask) == k.positions && (mask->size(0) == 1 || mask->size(0) == k.batch) &&
                    (mask->size(1) == 1 || mask->size(1) == k.channels),
                "mask must be bool [B or 1, C or 1, ...] with x's positions");
    check_device(x, *mask);
    k.mask = read(*mask);
    if (mask->size(0) == 1) k.mask.b = 0;
    if (mask->size(1) == 1) k.mask.c = 0;
  }
  if (gain) {
    check_shape(gain->scalar_type() == compute_type(x) && gain->numel() == k.transformed && gain->is_contiguous(),
                "gain must be [Ct] in the arithmetic's type");
    check_device(x, *gain);
    k.gain = gain->const_data_ptr();
  }
  return k;
}

}  // namespace nf
