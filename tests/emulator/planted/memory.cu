// Kernels with a fault in what they read or write, each beside the same kernel without it.

#include "device.h"
#include "planted.h"

namespace nf {
namespace planted {
namespace {

constexpr int kThreads = 64;

// out[i] = in[i] + in[i + 1], 0 behind the end; faulty reads in[n].
template <bool fault>
__global__ void neighbours(const float* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = in[i] + (fault || i + 1 < n ? in[i + 1] : 0);
}

// out[i] = in[i] + 1 in fours; faulty writes whole fours where n is no multiple of four.
template <bool fault>
__global__ void fours(const float* in, float* out, int n) {
  const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  for (int j = i; j < i + 4; ++j)
    if (j < n || (fault && i < n)) out[j] = (j < n ? in[j] : 0) + 1;
}

// in + 1 through shared memory, its slots shifted by one. One block.
__global__ void shifted(const float* in, float* out, int n) {
  NF_SHARED(float, slots);
  const int t = threadIdx.x;
  for (int start = 0; start < n; start += kThreads) {
    slots[t + 1] = in[start + t];
    sync_block();
    out[start + t] = slots[t + 1] + 1;
    sync_block();
  }
}

// out = in + 1; faulty leaves out what does not fill a block.
template <bool fault>
__global__ void all_but_the_rest(const float* in, float* out, int n) {
  const int end = fault ? n / kThreads * kThreads : n;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < end) out[i] = in[i] + 1;
}

// out = in + 1 in vectors of four, `offset` values behind the start.
__global__ void vectors(const float* in, float* out, int n, int offset) {
  const int i = 4 * threadIdx.x + offset;
  if (i + 4 > n) return;
  Pack<float, 4> v = load_pack<4>(in + i);
  for (int j = 0; j < 4; ++j) v[j] += 1;
  for (int j = 0; j < 4; ++j) out[i + j] = v[j];
}

// in + 1 through shared memory by asynchronous copies, the next tile under way while this one is used. One block.
template <int pending>
__global__ void copied(const float* in, float* out, int n) {
  NF_SHARED(float, slots);
  const int t = threadIdx.x;
  const auto fetch = [&](int start) {
    copy_async<4>(slots + start / kThreads % 2 * kThreads + t, in + start + t, start + t < n);
    copy_commit();
  };
  fetch(0);
  for (int start = 0; start < n; start += kThreads) {
    fetch(start + kThreads);
    copy_wait<pending>();
    sync_block();
    if (start + t < n) out[start + t] = slots[start / kThreads % 2 * kThreads + t] + 1;
    sync_block();
  }
}

__global__ void copied_at(const float* in, float* out, int n, int offset) {
  NF_SHARED(float, slots);
  copy_async<16>(slots + 4 * threadIdx.x, in + 4 * threadIdx.x + offset, static_cast<int>(4 * threadIdx.x) < n);
  copy_commit();
  copy_wait<0>();
  for (int j = 4 * threadIdx.x; j < n && j < static_cast<int>(4 * threadIdx.x + 4); ++j) out[j] = slots[j] + 1;
}

}  // namespace

void out_of_bounds_read(bool fault, const float* in, float* out, int n) {
  launch(fault ? neighbours<true> : neighbours<false>, Launch{}, n / kThreads + 1, kThreads, 0, in, out, n);
}

void out_of_bounds_write(bool fault, const float* in, float* out, int n) {
  launch(fault ? fours<true> : fours<false>, Launch{}, n / (4 * kThreads) + 1, kThreads, 0, in, out, n);
}

void out_of_bounds_shared(bool fault, const float* in, float* out, int n) {
  launch(shifted, Launch{}, 1, kThreads, (kThreads + (fault ? 0 : 1)) * sizeof(float), in, out, n);
}

void unwritten(bool fault, const float* in, float* out, int n) {
  launch(fault ? all_but_the_rest<true> : all_but_the_rest<false>, Launch{}, n / kThreads + 1, kThreads, 0, in, out, n);
}

void misaligned_vector(bool fault, const float* in, float* out, int n) {
  launch(vectors, Launch{}, 1, n / 4, 0, in, out, n, fault ? 1 : 0);
}

void misaligned_copy(bool fault, const float* in, float* out, int n) {
  launch(copied_at, Launch{}, 1, n / 4, n * sizeof(float), in, out, n, fault ? 1 : 0);
}

void missing_copy_wait(bool fault, const float* in, float* out, int n) {
  launch(fault ? copied<2> : copied<1>, Launch{}, 1, kThreads, 2 * kThreads * sizeof(float), in, out, n);
}

void copy_past_shared(bool fault, const float* in, float* out, int n) {
  launch(copied<1>, Launch{}, 1, kThreads, (fault ? 1 : 2) * kThreads * sizeof(float), in, out, n);
}

}  // namespace planted
}  // namespace nf
