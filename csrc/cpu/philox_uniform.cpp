// Philox uniforms on the CPU.

#include "../include/dequantize.h"
#include "philox_block.h"

namespace nf {
namespace NF_ISA {
namespace {

template <typename T>
struct UniformJob {
  View y;
  Extent extent;
  PhiloxKey key;
  StoreRun<T> store;

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<UniformJob*>(self);
    const Units units(job.extent);
    T buffer[kRoom];
    for (int64_t u = begin; u < end; ++u) {
      int64_t first, last;
      units.range(u, job.extent, &first, &last);
      for (int64_t i = first; i < last; i += kNoise) {
        const int n = static_cast<int>(last - i < kNoise ? last - i : kNoise);
        const T* noise = uniform_block(i, n, job.key, buffer);
        each_run(job.extent, i, n, [&](int64_t b, int64_t c, int64_t p, int at, int length) {
          job.store(address(job.y, b, c, p, sizeof(T)), job.y.p, length, noise + at);
        });
      }
    }
  }
};

template <typename T>
void uniform(const PhiloxUniform& k, const Launch& on) {
  UniformJob<T> job{k.y, {k.batch, k.channels, k.positions}, philox_key(k.key), store_run_for<T>(k.data)};
  View* views[] = {&job.y};
  job.extent = collapse(job.extent, views, 1);
  const int64_t units = Units(job.extent).count;
  if (units) on.parallel(units, 1, &job, UniformJob<T>::body);
}

}  // namespace

void philox_uniform_forward(const PhiloxUniform& k, const Launch& on) {
  k.data == DType::f64 ? uniform<double>(k, on) : uniform<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
