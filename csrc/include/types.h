// Plain structs that describe tensors to the kernels: raw pointers and strides, no torch.
#pragma once

#include <cstdint>

namespace nf {

enum class DType : int { f32 = 0, f64, bf16, f16 };

// A tensor seen as [B, C, P], strides in elements; 0 where it is expanded.
struct View {
  void* data = nullptr;
  int64_t b = 0, c = 0, p = 0;
};

// Runs body(ctx, begin, end) over [0, n) on the caller's threads, in pieces of at least `grain`.
using Body = void (*)(void* ctx, int64_t begin, int64_t end);
using Parallel = void (*)(int64_t n, int64_t grain, void* ctx, Body body);

}  // namespace nf
