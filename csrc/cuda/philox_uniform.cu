// Philox uniforms on CUDA: a thread makes four neighbours in logical order at a time.

#include "../include/dequantize.h"
#include "device.h"
#include "extent.h"
#include "storage.h"

namespace nf {
namespace cuda {
namespace generator {
namespace {

constexpr int kThreads = 128;
constexpr int kQuads = 4;  // of a thread

// `packed`: the tensor is one run of memory, aligned to 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    uniform(T* y, const int64_t* key_at, int64_t total, int64_t channels, int64_t positions, View at, bool packed) {
  const PhiloxKey key = philox_key(key_at);
#pragma unroll
  for (int s = 0; s < kQuads; ++s) {
    const int64_t quad = (static_cast<int64_t>(blockIdx.x) * kQuads + s) * kThreads + threadIdx.x, i = 4 * quad;
    if (i >= total) continue;
    const PhiloxWords w = philox(static_cast<uint64_t>(quad), key);
    const Pack<T, 4> u = {static_cast<T>(philox_unit(w.a)), static_cast<T>(philox_unit(w.b)),
                          static_cast<T>(philox_unit(w.c)), static_cast<T>(philox_unit(w.d))};
    if (packed && i + 4 <= total) {
      store_pack_stream(y + i, u);
      continue;
    }
    int64_t row = i / positions, p = i - row * positions, b = row / channels, c = row - b * channels;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (i + e >= total) continue;
      y[b * at.b + c * at.c + p * at.p] = u[e];
      if (++p == positions) {
        p = 0;
        if (++c == channels) c = 0, ++b;
      }
    }
  }
}

template <typename T>
void forward(const PhiloxUniform& k, const Launch& on) {
  Extent extent{k.batch, k.channels, k.positions};
  View at = k.y;
  View* views[] = {&at};
  clean(extent, views, 1);
  collapse(extent, views, 1, false);
  join_samples(extent, views, 1);
  const int64_t total = extent.batch * extent.elements();
  const bool packed =
      extent.batch == 1 && extent.channels == 1 && at.p == 1 && reinterpret_cast<uintptr_t>(k.y.data) % 16 == 0;
  launch(uniform<T>, on, (total + 4 * kQuads * kThreads - 1) / (4 * kQuads * kThreads), kThreads, 0,
         static_cast<T*>(k.y.data), k.key, total, extent.channels, extent.positions, at, packed);
}

}  // namespace
}  // namespace generator

void philox_uniform_forward(const PhiloxUniform& k, const Launch& on) {
  k.data == DType::f64 ? generator::forward<double>(k, on) : generator::forward<float>(k, on);
}

}  // namespace cuda
}  // namespace nf
