// The names of csrc/cuda/device.h, played on the CPU. Included by it under NF_EMULATED; see README.md for the rules.
#pragma once

#include <cmath>

// --- CUDA's own names ------------------------------------------------------------------------------------------------

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define NF_DEVICE inline
#define NF_SHARED(T, name) T* name = static_cast<T*>(::nf::emulator::shared_memory())

namespace nf {
namespace emulator {

struct Index {
  unsigned x;  // grids and blocks have one dimension
};

}  // namespace emulator
}  // namespace nf

extern nf::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
float __bfloat162float(__nv_bfloat16 v);
float __half2float(__half v);
__nv_bfloat16 __float2bfloat16_rn(float v);
__half __float2half_rn(float v);

namespace nf {
namespace emulator {

// --- scheduler.cpp ---------------------------------------------------------------------------------------------------

enum class Collective : int { sync = 0, shuffle, shuffle_xor, shuffle_down, vote, mma };

struct alignas(16) Slot {
  unsigned char bytes[48];
};

using Body = void (*)(void* context);

// Runs every thread of every block; an error in one ends the launch and is thrown here.
void run(const void* kernel, int64_t blocks, int threads, size_t shared_bytes, Body body, void* context);

void* shared_memory();

// Waits for all lanes of the warp at the same kind of collective; what each lane brought, by lane. Valid until the
// next collective.
const Slot* gather(Collective kind, const void* in, size_t bytes);

void check_aligned(const void* address, size_t alignment, const char* what);
[[noreturn]] void fail(const std::string& what);

void copy_issue(void* shared, const void* global, int bytes, bool valid);
void copy_close_group();
void copy_deliver(int pending);

void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <typename T>
T from_slot(const Slot& slot) {
  T v;
  std::memcpy(&v, slot.bytes, sizeof v);
  return v;
}

}  // namespace emulator

// --- device.h's names ------------------------------------------------------------------------------------------------

template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch&, int64_t blocks, int threads, size_t shared_bytes, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  static_assert((size_t{0} + ... + sizeof(P)) <= 4096, "a kernel's parameters may take 4 KiB");
  if (blocks == 0) return;
  check_launch(blocks, threads, shared_bytes);
  std::tuple<P...> values(std::forward<A>(args)...);
  auto body = [&] { std::apply(kernel, values); };
  emulator::run(
      reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

inline int lane() { return static_cast<int>(threadIdx.x & 31u); }
inline int warp() { return static_cast<int>(threadIdx.x >> 5); }

void sync_block();
inline void sync_warp() { emulator::gather(emulator::Collective::sync, nullptr, 0); }

template <typename T>
constexpr bool can_shuffle =
    std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int> || std::is_same_v<T, uint32_t>;

template <typename T>
T shuffle(T v, int lane) {
  static_assert(can_shuffle<T>);
  return emulator::from_slot<T>(emulator::gather(emulator::Collective::shuffle, &v, sizeof v)[lane & 31]);
}
template <typename T>
T shuffle_xor(T v, int mask) {
  static_assert(can_shuffle<T>);
  return emulator::from_slot<T>(
      emulator::gather(emulator::Collective::shuffle_xor, &v, sizeof v)[(lane() ^ mask) & 31]);
}
template <typename T>
T shuffle_down(T v, int delta) {
  static_assert(can_shuffle<T>);
  const emulator::Slot* slots = emulator::gather(emulator::Collective::shuffle_down, &v, sizeof v);
  return lane() + delta < 32 ? emulator::from_slot<T>(slots[lane() + delta]) : v;
}

inline bool vote_any(bool v) {
  const emulator::Slot* slots = emulator::gather(emulator::Collective::vote, &v, sizeof v);
  bool any = false;
  for (int i = 0; i < 32; ++i) any |= emulator::from_slot<bool>(slots[i]);
  return any;
}
inline bool vote_all(bool v) { return !vote_any(!v); }

template <int N, typename T>
Pack<T, N> load_pack(const T* from) {
  emulator::check_aligned(from, alignof(Pack<T, N>), "a vector load");
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, typename T>
void store_pack(T* to, const Pack<T, N>& pack) {
  emulator::check_aligned(to, alignof(Pack<T, N>), "a vector store");
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}
template <int N, typename T>
Pack<T, N> load_pack_stream(const T* from) {
  return load_pack<N>(from);
}
template <int N, typename T>
void store_pack_stream(T* to, const Pack<T, N>& pack) {
  store_pack(to, pack);
}

inline float exp2_quick(float v) { return std::exp2(v); }

inline uint32_t to_tf32(float v) {
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  if ((u & 0x7f800000u) == 0x7f800000u) return v != v ? 0x7fffffffu : u;
  return (u + 0x1000u) & ~0x1fffu;
}
inline float from_tf32(uint32_t word) {
  word &= ~0x1fffu;
  float v;
  std::memcpy(&v, &word, sizeof v);
  return v;
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulator::multiply(d, a, b); }

template <int bytes>
void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  emulator::copy_issue(shared, global, bytes, valid);
  if (valid) {  // read here and now too, so that a sanitizer points at the line that asked for it
    volatile char sink = static_cast<const char*>(global)[0];
    sink = static_cast<const char*>(global)[bytes - 1];
    static_cast<void>(sink);
  }
}
inline void copy_commit() { emulator::copy_close_group(); }
template <int pending>
void copy_wait() {
  emulator::copy_deliver(pending);
}

}  // namespace nf
