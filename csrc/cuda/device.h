// What a kernel may use of the device, and nothing else: the same .cu files are compiled by nvcc and, with NF_EMULATED,
// as plain C++ that runs on the CPU (tests/emulator). Grids and blocks have one dimension.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../include/types.h"

namespace nf {

constexpr size_t kSharedLimit = 227 * 1024;  // the most any architecture gives a block

inline void check_launch(int64_t blocks, int threads, size_t shared_bytes) {
  const auto refuse = [](const std::string& what) { throw std::runtime_error("nfkernels: cannot launch " + what); };
  if (blocks < 0 || blocks >= int64_t{1} << 31)
    refuse(std::to_string(blocks) + " blocks (the limit is 2147483647): the tensor is too large");
  if (threads < 1 || threads > 1024) refuse(std::to_string(threads) + " threads per block (1 to 1024 are possible)");
  if (shared_bytes > kSharedLimit)
    refuse("with " + std::to_string(shared_bytes) + " bytes of shared memory per block (the limit is " +
           std::to_string(kSharedLimit) + ")");
}

// N values that are read or written at once: in one access up to 16 bytes, in accesses of 16 bytes above that.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  static_assert(sizeof(T) * N == 2 || sizeof(T) * N == 4 || sizeof(T) * N == 8 || sizeof(T) * N % 16 == 0);
  static constexpr int size = N;
  T values[N];
#ifdef NF_EMULATED
  T& operator[](int i) { return values[i]; }
  const T& operator[](int i) const { return values[i]; }
#else
  __host__ __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __host__ __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
#endif
};

}  // namespace nf

#ifdef NF_EMULATED

#include "emulator.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#define NF_DEVICE __device__ __forceinline__

// T* name: the block's dynamic shared memory, 16-byte aligned.
#define NF_SHARED(T, name)                                          \
  extern __shared__ __align__(16) unsigned char nf_shared_memory[]; \
  T* name = reinterpret_cast<T*>(nf_shared_memory)

namespace nf {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("nfkernels: ") + what + ": " + cudaGetErrorString(status));
}

// Above 48 KiB a kernel must have been allowed its shared memory: once for a device, all that a block can have there.
// (The limit belongs to the kernel, not to a launch: another thread's smaller one would take this launch's away.)
inline void allow_shared(const void* function, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "no current device");
  const std::lock_guard<std::mutex> lock(mutex);
  int& limit = allowed[{function, device}];
  if (limit == 0) {
    int most = 0;
    check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "no such device");
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
               "a kernel was not allowed its shared memory");
    limit = most;
  }
  if (shared_bytes > static_cast<size_t>(limit))
    throw std::runtime_error("nfkernels: a kernel needs " + std::to_string(shared_bytes) +
                             " bytes of shared memory per block, this GPU has " + std::to_string(limit));
}

// Nothing is launched for 0 blocks. Arguments are converted to the kernel's parameters as in a call.
template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& on, int64_t blocks, int threads, size_t shared_bytes, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  if (blocks == 0) return;
  check_launch(blocks, threads, shared_bytes);
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) allow_shared(function, shared_bytes);
  std::tuple<P...> values(std::forward<A>(args)...);
  std::apply(
      [&](auto&... value) {
        void* addresses[] = {&value..., nullptr};
        check_cuda(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(threads), addresses,
                                    shared_bytes, static_cast<cudaStream_t>(on.stream)),
                   "a kernel could not be launched");
      },
      values);
}

NF_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31u); }
NF_DEVICE int warp() { return static_cast<int>(threadIdx.x >> 5); }

NF_DEVICE void sync_block() { __syncthreads(); }
NF_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>
NF_DEVICE T shuffle(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
template <typename T>
NF_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <typename T>
NF_DEVICE T shuffle_down(T v, int delta) {
  return __shfl_down_sync(0xffffffffu, v, delta);
}
NF_DEVICE bool vote_any(bool v) { return __any_sync(0xffffffffu, v); }
NF_DEVICE bool vote_all(bool v) { return __all_sync(0xffffffffu, v); }

template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <typename T, int N>
using WordOf = typename Word<alignof(Pack<T, N>)>::type;

template <int N, typename T>
NF_DEVICE Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, typename T>
NF_DEVICE void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// For global memory that is not needed again soon: first to leave the cache.
template <int N, typename T>
NF_DEVICE Pack<T, N> load_pack_stream(const T* from) {
  using W = WordOf<T, N>;
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / sizeof(W)); ++i)
    reinterpret_cast<W*>(&pack)[i] = __ldcs(reinterpret_cast<const W*>(from) + i);
  return pack;
}

template <int N, typename T>
NF_DEVICE void store_pack_stream(T* to, const Pack<T, N>& pack) {
  using W = WordOf<T, N>;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / sizeof(W)); ++i)
    __stcs(reinterpret_cast<W*>(to) + i, reinterpret_cast<const W*>(&pack)[i]);
}

// 2^v, within 2 ulp; denormal results are 0. One instruction, where exp2f mends denormals.
NF_DEVICE float exp2_quick(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// Round to nearest, ties away from zero. The low 13 bits of the word mean nothing to the hardware.
NF_DEVICE uint32_t to_tf32(float v) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(v));
  return word;
}
NF_DEVICE float from_tf32(uint32_t word) { return __uint_as_float(word & ~0x1fffu); }

// d += a b, m16n8k8: with g = lane / 4 and t = lane % 4
//   a: (row g, k t), (g + 8, t), (g, t + 4), (g + 8, t + 4)   b: (k t, column g), (t + 4, g)
//   d: (row g, column 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
NF_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies to shared memory behind the thread's back; zeros where not valid (the source is not read then). The data is
// there once this thread has waited for the copy's group, for other threads after a barrier besides.
template <int bytes>
NF_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int read = valid ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(bytes), "r"(read)
                 : "memory");
}
NF_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
NF_DEVICE void copy_wait() {  // until at most `pending` of this thread's newest groups are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace nf

#endif
