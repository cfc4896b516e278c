// The coupling that a raw op's arguments describe, for every op that holds one; shapes checked.
#pragma once

#include "../include/affine_coupling.h"
#include "selection.h"

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
  k.channel_map = channel_map_of(x, channel_map);
  k.mask = mask_of(x, mask);
  if (gain) {
    check_shape(gain->scalar_type() == compute_type(x) && gain->numel() == k.transformed && gain->is_contiguous(),
                "gain must be [Ct] in the arithmetic's type");
    check_device(x, *gain);
    k.gain = gain->const_data_ptr();
  }
  return k;
}

}  // namespace nf
