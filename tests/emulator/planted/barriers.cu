// Kernels with a fault in how their threads wait for each other, each beside the same kernel without it.

#include "device.h"
#include "planted.h"

namespace nf {
namespace planted {
namespace {

// Every tile of 64 values, reversed, by one block that goes over all tiles.
template <bool after_write, bool before_reuse>
__global__ void reverse_tiles(const float* in, float* out, int n) {
  NF_SHARED(float, tile);
  const int t = threadIdx.x;
  for (int start = 0; start < n; start += 64) {
    tile[t] = in[start + t];
    if constexpr (after_write) sync_block();
    out[start + t] = tile[63 - t];
    if constexpr (before_reuse) sync_block();
  }
}

// The same for tiles of 32 and one warp.
template <bool after_write>
__global__ void reverse_in_warp(const float* in, float* out, int n) {
  NF_SHARED(float, tile);
  for (int start = 0; start < n; start += 32) {
    tile[lane()] = in[start + lane()];
    if constexpr (after_write) sync_warp();
    out[start + lane()] = tile[31 - lane()];
    sync_warp();
  }
}

// Adds 1 to each value; the barrier is reached by every thread or, faulty, only by those that have one.
template <bool divergent>
__global__ void barrier_in_branch(const float* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    if constexpr (divergent) sync_block();
    out[i] = in[i] + 1;
  }
  if constexpr (!divergent) sync_block();
}

template <bool divergent>
__global__ void return_before_barrier(const float* in, float* out, int n) {
  NF_SHARED(float, tile);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if constexpr (divergent)
    if (i >= n) return;
  tile[threadIdx.x] = i < n ? in[i] : 0;
  sync_block();
  if (i < n) out[i] = tile[threadIdx.x] + 1;
}

// The sum of each 32 values, at each of them; faulty where only lanes with a value take part.
template <bool divergent>
__global__ void warp_sums(const float* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < n ? in[i] : 0;
  if (!divergent || i < n)
    for (int step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  if (i < n) out[i] = sum;
}

// Half a warp votes while the other half shuffles.
template <bool divergent>
__global__ void two_collectives(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  float v = in[i] + 1;
  if constexpr (divergent) {
    if (lane() < 16)
      v = shuffle(v, lane());
    else
      v = vote_any(true) ? v : 0;
  } else {
    v = shuffle(v, lane());
    v = vote_any(true) ? v : 0;
  }
  if (i < n) out[i] = v;
}

}  // namespace

void missing_barrier(bool fault, const float* in, float* out, int n) {
  launch(fault ? reverse_tiles<false, true> : reverse_tiles<true, true>, Launch{}, 1, 64, 64 * sizeof(float), in, out,
         n);
}

void missing_barrier_before_reuse(bool fault, const float* in, float* out, int n) {
  launch(fault ? reverse_tiles<true, false> : reverse_tiles<true, true>, Launch{}, 1, 64, 64 * sizeof(float), in, out,
         n);
}

void missing_warp_barrier(bool fault, const float* in, float* out, int n) {
  launch(fault ? reverse_in_warp<false> : reverse_in_warp<true>, Launch{}, 1, 32, 32 * sizeof(float), in, out, n);
}

void divergent_barrier(bool fault, const float* in, float* out, int n) {
  launch(fault ? barrier_in_branch<true> : barrier_in_branch<false>, Launch{}, n / 128 + 1, 128, 0, in, out, n);
}

void early_return(bool fault, const float* in, float* out, int n) {
  launch(fault ? return_before_barrier<true> : return_before_barrier<false>, Launch{}, n / 128 + 1, 128,
         128 * sizeof(float), in, out, n);
}

void missing_lane(bool fault, const float* in, float* out, int n) {
  launch(fault ? warp_sums<true> : warp_sums<false>, Launch{}, n / 128 + 1, 128, 0, in, out, n);
}

void mixed_collectives(bool fault, const float* in, float* out, int n) {
  launch(fault ? two_collectives<true> : two_collectives<false>, Launch{}, 1, n, 0, in, out, n);
}

void partial_warp(bool fault, const float* in, float* out, int n) {
  const int threads = fault ? 100 : 128;  // 100 is three warps and four lanes
  launch(warp_sums<false>, Launch{}, (n + threads - 1) / threads, threads, 0, in, out, n);
}

}  // namespace planted
}  // namespace nf
