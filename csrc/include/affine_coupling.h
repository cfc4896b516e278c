// What one affine coupling is, to every kernel. The packed form is that of nfkernels/reference/affine_coupling.py.
#pragma once

#include "scale_map.h"
#include "types.h"

namespace nf {

struct Coupling {
  MapKind kind;
  bool interleaved, scale_leads;  // layout of params
  bool shift_first;               // effective: (x + t) s, an inverse having swapped it
  bool negate_shift;              // an inverse adds -t
  bool scaled_shift;              // the map's prescale multiplies the shift too
  bool negate_log;                // the scale is 1 / s: inverse or reciprocal, not both
  ScaleMapConstants constants;
  DType data, raw;  // of x and of params
  int64_t batch, channels, positions;
  int64_t transformed;         // params channels that carry a shift
  int64_t first;               // the data channel of params channel 0, where there is no map
  const int64_t* channel_map;  // [channels]: params channel or -1; or null
  View mask;                   // bool, true where transformed; data null: everywhere
  const void* gain;            // [transformed] in the arithmetic's type, or null

  // What the raw shift is multiplied by before it is added.
  double shift_factor() const { return (negate_shift ? -1 : 1) * (scaled_shift ? constants.prescale : 1); }
  bool has_scale() const { return kind != MapKind::additive; }
  int64_t shift_offset(int64_t channel_stride) const {
    return has_scale() && scale_leads ? (interleaved ? 1 : transformed) * channel_stride : 0;
  }
  int64_t scale_offset(int64_t channel_stride) const {
    return has_scale() && !scale_leads ? (interleaved ? 1 : transformed) * channel_stride : 0;
  }
  int64_t params_step() const { return has_scale() && interleaved ? 2 : 1; }
  // The params channel of data channel c, or -1 where c passes through.
  int64_t source(int64_t c) const {
    const int64_t j = channel_map ? channel_map[c] : c - first;
    return j >= 0 && j < transformed ? j : -1;
  }
};

inline void unpack_form(Coupling& k, int64_t bits) {
  const int layout = bits >> 4 & 3;
  const bool shift_first = bits >> 6 & 1, inverse = bits >> 9 & 1, reciprocal = bits >> 10 & 1;
  k.kind = static_cast<MapKind>(bits & 15);
  k.interleaved = layout >= 2;
  k.scale_leads = layout & 1;
  k.shift_first = shift_first != inverse;
  k.negate_shift = inverse;
  k.negate_log = inverse != reciprocal;
  k.scaled_shift = bits >> 11 & 1;
}

// The same coupling in the other direction.
inline Coupling inverted(Coupling k) {
  k.shift_first = !k.shift_first;
  k.negate_shift = !k.negate_shift;
  k.negate_log = !k.negate_log;
  return k;
}

struct CouplingForward {
  View x, params, y;
  const void* logdet_in;  // running log-determinant or null
  int64_t logdet_in_stride;
  void* logdet;
};

struct CouplingBackward {
  View y, params, dy, dx, dparams;  // dy.data null: zero
  View x;                           // the input, rebuilt from y; data null: not wanted
  const void* dlogdet;              // null: zero
  int64_t dlogdet_stride;
  void* dgain;  // [transformed] or null
};

}  // namespace nf
