// The planted faults: a name for each, with the same arguments for all. `n` values in, `n` values out.
#pragma once

#include <cstddef>
#include <cstdint>

#define NF_PLANTED(X)             \
  X(missing_barrier)              \
  X(missing_barrier_before_reuse) \
  X(missing_warp_barrier)         \
  X(divergent_barrier)            \
  X(early_return)                 \
  X(missing_lane)                 \
  X(mixed_collectives)            \
  X(partial_warp)                 \
  X(out_of_bounds_read)           \
  X(out_of_bounds_write)          \
  X(out_of_bounds_shared)         \
  X(unwritten)                    \
  X(misaligned_vector)            \
  X(misaligned_copy)              \
  X(missing_copy_wait)            \
  X(copy_past_shared)             \
  X(unrounded_operand)

namespace nf {
namespace planted {

#define NF_DECLARE(name) void name(bool fault, const float* in, float* out, int n);
NF_PLANTED(NF_DECLARE)
#undef NF_DECLARE

void shuffles(int type, const void* in, void* out, int threads);
void votes(const float* in, float* out, int threads);
void turns(int* out, int64_t blocks, int threads, size_t shared_bytes);
void product(int terms, const float* a, const float* b, float* d, int k);
void conversions(bool half, const float* in, void* stored, float* back, int n);
void packs(int which, const void* in, void* out);

}  // namespace planted
}  // namespace nf
