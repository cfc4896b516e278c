// Elements as they lie in memory, and their values in the arithmetic's type.
#pragma once

#include "device.h"

namespace nf {

// load: exact. store: rounds to nearest even, through float as torch does.
template <DType d>
struct Storage;
template <>
struct Storage<DType::f32> {
  using type = float;
  static NF_DEVICE float load(float v) { return v; }
  static NF_DEVICE float store(float v) { return v; }
};
template <>
struct Storage<DType::f64> {
  using type = double;
  static NF_DEVICE double load(double v) { return v; }
  static NF_DEVICE double store(double v) { return v; }
};
template <>
struct Storage<DType::bf16> {
  using type = __nv_bfloat16;
  static NF_DEVICE float load(__nv_bfloat16 v) { return __bfloat162float(v); }
  static NF_DEVICE __nv_bfloat16 store(float v) { return __float2bfloat16_rn(v); }
};
template <>
struct Storage<DType::f16> {
  using type = __half;
  static NF_DEVICE float load(__half v) { return __half2float(v); }
  static NF_DEVICE __half store(float v) { return __float2half_rn(v); }
};

template <DType d>
using StorageType = typename Storage<d>::type;

inline int64_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

}  // namespace nf
