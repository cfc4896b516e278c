// From torch's tensors to the kernels' plain structs. Only the bindings include torch, through its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>

#include "../include/types.h"

namespace nf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "nfkernels: expected a floating point tensor");
  }
}

inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t positions_of(const Tensor& t) {
  int64_t n = 1;
  for (int64_t i = 2; i < t.dim(); ++i) n *= t.size(i);
  return n;
}

// The public ops hand over only tensors whose axes after the channels are one axis to a stride (ops/_layout.py).
inline View view_of(const Tensor& t, void* data) {
  View v;
  v.data = data;
  v.b = t.stride(0);
  v.c = t.stride(1);
  v.p = 1;
  if (t.numel() == 0) return v;
  int64_t length = 1;
  for (int64_t i = t.dim() - 1; i >= 2; --i) {
    if (t.size(i) == 1) continue;
    if (length == 1)
      v.p = t.stride(i);
    else
      STD_TORCH_CHECK(t.stride(i) == v.p * length, "nfkernels: spatial strides do not collapse; pass x.contiguous()");
    length *= t.size(i);
  }
  return v;
}

inline View read(const Tensor& t) { return view_of(t, const_cast<void*>(t.const_data_ptr())); }
inline View write(const Tensor& t) { return view_of(t, t.mutable_data_ptr()); }
inline View read(const OptionalTensor& t) { return t ? read(*t) : View{}; }
inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline Tensor new_vector(const Tensor& like, int64_t n, ScalarType type) {
  return torch::stable::new_empty(like, {n}, type);
}

// In like's strides; torch::stable has it without a type.
inline Tensor empty_like(const Tensor& like, ScalarType type) {
  if (like.scalar_type() == type) return torch::stable::empty_like(like);
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(like),         from(std::optional<ScalarType>(type)),
                                    from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The kernels take addresses on trust: a tensor on another device would be an illegal access.
inline void check_device(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(other.get_device_index() == x.get_device_index() && other.is_cuda() == x.is_cuda(),
                  "nfkernels: all tensors must be on one device");
}

inline void check_shape(bool ok, const char* what) { STD_TORCH_CHECK(ok, "nfkernels: ", what); }

}  // namespace nf
