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

// Where and how a kernel runs.
struct Launch {
  Parallel parallel = nullptr;  // CPU: the caller's threads
  void* stream = nullptr;       // CUDA: a cudaStream_t
  int multiprocessors = 0;      // CUDA: of the device, for persistent grids
  void* (*allocate)(void* owner, int64_t bytes) = nullptr;
  void* owner = nullptr;

  // Memory on the tensors' device, aligned to 256 bytes and never zeroed, that lives until the op's work is done.
  void* scratch(int64_t bytes) const { return bytes > 0 ? allocate(owner, bytes) : nullptr; }
};

}  // namespace nf
