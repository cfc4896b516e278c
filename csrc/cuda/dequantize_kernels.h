// The dequantisation's kernels. Samples that are one run of aligned memory go by 16 bytes and whole warps (runs);
// anything else element by element, four neighbours to a thread (scattered). Both number the noise by the element's
// logical index, and sum a log-determinant in an order that shapes and layouts alone fix.
#pragma once

#include "../include/dequantize.h"
#include "device.h"
#include "storage.h"

namespace nf {
namespace cuda {
namespace dequantize {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 512;       // elements that a warp takes at once: 16 to a lane
constexpr int kBlockChunks = 16;  // of a block, at most
constexpr int kThreadQuads = 4;   // of a thread of the scattered kernels, at most

template <DType d>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<DType::f64> {
  using type = double;
};

template <typename T>
struct Forward {
  const void* x;
  void* y;
  const int64_t* key;
  const T* running;  // or null
  int64_t running_stride;
  T* out;  // [batch, parts]; with one part, the log-determinant itself
  int64_t batch, channels, positions, elements;
  View from, to;    // strides
  int parts;        // that a sample is cut into
  int group;        // scattered: threads of a part, a power of two up to 32, or the block
  bool by_channel;  // scattered: neighbouring threads take neighbouring channels
  bool bytes;       // scattered: x is uint8
  bool logit;
  int64_t samples;  // without a logit: log-determinants to pass on, at `out`
  GreyConstants<T> grey;
};

// Offsets within a sample fit 32 bits nearly always; a 64-bit division costs five times as much.
NF_DEVICE int64_t quotient(int64_t n, int64_t by, bool narrow) {
  return narrow ? static_cast<int64_t>(static_cast<uint32_t>(n) / static_cast<uint32_t>(by)) : n / by;
}

// Without a logit the log-determinant is the running one, or zero.
template <typename T>
NF_DEVICE void pass_logdet(const Forward<T>& k) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < k.samples; b += stride)
    k.out[b] = k.running ? k.running[b * k.running_stride] : T(0);
}

// The sum over `group` threads (a power of two up to 32), in all of them.
template <typename T>
NF_DEVICE T group_sum(T v, int group) {
  for (int step = group / 2; step > 0; step /= 2) v += shuffle_xor(v, step);
  return v;
}

// The sum over the block, in thread 0. `shared` [kWarps].
template <typename T>
NF_DEVICE T block_sum(T v, T* shared) {
  v = group_sum(v, 32);
  if (lane() == 0) shared[warp()] = v;
  sync_block();
  T total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += shared[i];
  return total;
}

template <typename T>
NF_DEVICE void finish_part(const Forward<T>& k, int64_t unit, int64_t b, T total) {
  k.out[unit] = total + (k.parts == 1 && k.running ? k.running[b * k.running_stride] : T(0));
}

// What the noise of one word makes of x; adds its term to the log-determinant.
template <bool logit, typename T>
NF_DEVICE T made_of(T x, uint32_t word, const Forward<T>& k, T& sum) {
  const T v = unit_of(x, static_cast<T>(philox_unit(word)), k.grey);
  if constexpr (!logit) return v;
  const Logit<T> made = logit_of(v, k.grey);
  sum += made.log_slope;
  return made.y;
}

// --- runs ------------------------------------------------------------------------------------------------------------

// Elements of a lane in one step: a store of 16 bytes, of 32 in f64.
template <DType d>
constexpr int kWidth = sizeof(StorageType<d>) == 2 ? 8 : 4;
template <DType d>
constexpr int kSteps = kChunk / 32 / kWidth<d>;

// One chunk: the elements within + 512 s of it are this lane's. `staged`: bytes of the chunk; `given`: values.
template <DType d, bool bytes, bool logit, typename T, typename S>
NF_DEVICE T chunk(const Forward<T>& k, const PhiloxKey& key, const unsigned char* staged,
                  const Pack<S, kWidth<d>>* given, S* to, int64_t left, uint64_t first) {
  T sum = 0;
#pragma unroll
  for (int s = 0; s < kSteps<d>; ++s) {
    const int within = (32 * s + lane()) * kWidth<d>;
    if (within >= left) continue;
    Pack<uint8_t, kWidth<d>> levels;
    if constexpr (bytes) levels = load_pack<kWidth<d>>(staged + within);
    Pack<S, kWidth<d>> made;
#pragma unroll
    for (int q = 0; q < kWidth<d>; q += 4) {
      const PhiloxWords w = philox((first + within + q) >> 2, key);
      const uint32_t words[4] = {w.a, w.b, w.c, w.d};
#pragma unroll
      for (int e = q; e < q + 4; ++e) {
        T x;
        if constexpr (bytes)
          x = static_cast<T>(levels[e]);
        else
          x = static_cast<T>(Storage<d>::load(given[s][e]));
        made[e] = Storage<d>::store(made_of<logit>(x, words[e - q], k, sum));
      }
    }
    store_pack_stream(to + within, made);
  }
  return sum;
}

// x and y: samples are runs of memory, aligned to 16 bytes. A block takes up to kBlockChunks chunks of one sample.
template <DType d, bool bytes>
__global__ void __launch_bounds__(kThreads) forward_runs(const Forward<typename Arithmetic<d>::type> k) {
  using T = typename Arithmetic<d>::type;
  using S = StorageType<d>;
  NF_SHARED(unsigned char, shared);  // kWarps sums, then 512 bytes of images for each warp
  unsigned char* staged = shared + 16 * kWarps + kChunk * warp();
  if (!k.logit) pass_logdet(k);
  const int64_t b = k.parts == 1 ? blockIdx.x : blockIdx.x / static_cast<unsigned>(k.parts);
  const int64_t part = static_cast<int64_t>(blockIdx.x) - b * k.parts;
  const int64_t last = (part + 1) * kBlockChunks * kChunk, end = last < k.elements ? last : k.elements;
  const PhiloxKey key = philox_key(k.key);
  T sum = 0;
  for (int64_t i = (part * kBlockChunks + warp()) * kChunk; i < end; i += kWarps * kChunk) {
    const int64_t left = end - i;
    Pack<S, kWidth<d>> given[bytes ? 1 : kSteps<d>];
    if constexpr (bytes) {
      sync_warp();  // the chunk before has been read
      if (16 * lane() < left) {
        const auto* from = static_cast<const uint8_t*>(k.x) + b * k.from.b + i;
        store_pack(staged + 16 * lane(), load_pack_stream<16>(from + 16 * lane()));
      }
      sync_warp();
    } else {
      const auto* from = static_cast<const S*>(k.x) + b * k.from.b + i;
#pragma unroll
      for (int s = 0; s < kSteps<d>; ++s) {
        const int within = (32 * s + lane()) * kWidth<d>;
        if (within < left) given[s] = load_pack_stream<kWidth<d>>(from + within);
      }
    }
    S* to = static_cast<S*>(k.y) + b * k.to.b + i;
    const uint64_t first = static_cast<uint64_t>(b * k.elements + i);
    sum += k.logit ? chunk<d, bytes, true>(k, key, staged, given, to, left, first)
                   : chunk<d, bytes, false>(k, key, staged, given, to, left, first);
  }
  if (!k.logit) return;
  const T total = block_sum(sum, reinterpret_cast<T*>(shared));
  if (threadIdx.x == 0) finish_part(k, blockIdx.x, b, total);
}

// --- scattered -------------------------------------------------------------------------------------------------------

// Any strides. A thread takes counters: four neighbours in logical order, of which the first and the last counter of a
// sample may have fewer.
template <DType d>
__global__ void __launch_bounds__(kThreads) forward_scattered(const Forward<typename Arithmetic<d>::type> k) {
  using T = typename Arithmetic<d>::type;
  using S = StorageType<d>;
  NF_SHARED(unsigned char, shared);
  if (!k.logit) pass_logdet(k);
  const int member = static_cast<int>(threadIdx.x) & (k.group - 1);
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / k.group;
  const int64_t b = k.parts == 1 ? unit : unit / k.parts, part = unit - b * k.parts;
  const bool narrow = k.elements < int64_t{1} << 31;
  const PhiloxKey key = philox_key(k.key);
  T sum = 0;
  if (b < k.batch) {
    const int64_t first = b * k.elements, counter = k.by_channel ? 0 : first >> 2;
    const int64_t counters = k.by_channel ? k.elements / 4 : (first + k.elements + 3) / 4 - counter;
    for (int j = 0; j < kThreadQuads; ++j) {
      const int64_t t = (part * kThreadQuads + j) * k.group + member;
      if (t >= counters) break;
      int64_t n0;  // the first element within the sample, below 0 where the sample before has it
      if (k.by_channel) {
        const int64_t quad = quotient(t, k.channels, narrow);
        n0 = (t - quad * k.channels) * k.positions + 4 * quad;
      } else {
        n0 = 4 * (counter + t) - first;
      }
      const PhiloxWords w = philox(static_cast<uint64_t>(first + n0) >> 2, key);
      const uint32_t words[4] = {w.a, w.b, w.c, w.d};
      const int64_t start = n0 < 0 ? 0 : n0;
      int64_t c = quotient(start, k.positions, narrow), p = start - c * k.positions;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (n0 + e < 0 || n0 + e >= k.elements) continue;
        const int64_t at = b * k.from.b + c * k.from.c + p * k.from.p;
        T x;
        if (k.bytes)
          x = static_cast<T>(static_cast<const uint8_t*>(k.x)[at]);
        else
          x = static_cast<T>(Storage<d>::load(static_cast<const S*>(k.x)[at]));
        static_cast<S*>(k.y)[b * k.to.b + c * k.to.c + p * k.to.p] =
            Storage<d>::store(k.logit ? made_of<true>(x, words[e], k, sum) : made_of<false>(x, words[e], k, sum));
        if (++p == k.positions) p = 0, ++c;
      }
    }
  }
  if (!k.logit) return;
  if (k.group <= 32) {
    sum = group_sum(sum, k.group);
    if (member == 0 && b < k.batch) finish_part(k, unit, b, sum);
  } else {
    const T total = block_sum(sum, reinterpret_cast<T*>(shared));
    if (threadIdx.x == 0) finish_part(k, unit, b, total);
  }
}

// Second stage: a warp sums the parts of a sample, always in the same order. No parts: an empty sample.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_parts(const T* partial, const T* running, int64_t running_stride, T* logdet, int64_t batch, int parts) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  T sum = 0;
  if (b < batch)
    for (int i = lane(); i < parts; i += 32) sum += partial[b * parts + i];
  sum = group_sum(sum, 32);
  if (b < batch && lane() == 0) logdet[b] = sum + (running ? running[b * running_stride] : T(0));
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
struct Backward {
  const void *y, *dy;  // dy null: zero
  void* dx;
  const T* dlogdet;  // null: zero
  int64_t dlogdet_stride;
  int64_t total, elements, channels, positions;
  View y_at, dy_at, dx_at;  // strides
  bool logit;
  GreyConstants<T> grey;
};

template <typename T>
NF_DEVICE T gradient(T y, T dy, T dlogdet, const Backward<T>& k) {
  return k.logit ? logit_gradient(y, dy, dlogdet, k.grey) : k.grey.slope * dy;
}

template <typename T>
NF_DEVICE T dlogdet_of(const Backward<T>& k, int64_t b) {
  return k.dlogdet ? k.dlogdet[b * k.dlogdet_stride] : T(0);
}

constexpr int kGradientSteps = 4;

// All tensors: samples are runs of memory in one shared order, aligned to 16 bytes.
template <DType d>
__global__ void __launch_bounds__(kThreads) backward_runs(const Backward<typename Arithmetic<d>::type> k) {
  using T = typename Arithmetic<d>::type;
  using S = StorageType<d>;
  constexpr int kWidth = 16 / sizeof(S);
  const bool narrow = k.total < int64_t{1} << 31, reads_y = k.logit;
  Pack<S, kWidth> y[kGradientSteps], dy[kGradientSteps];
  int64_t sample[kGradientSteps], within[kGradientSteps];
#pragma unroll
  for (int s = 0; s < kGradientSteps; ++s) {
    const int64_t i = ((static_cast<int64_t>(blockIdx.x) * kGradientSteps + s) * kThreads + threadIdx.x) * kWidth;
    sample[s] = -1;
    if (i >= k.total) continue;
    sample[s] = quotient(i, k.elements, narrow);
    within[s] = i - sample[s] * k.elements;
    if (reads_y) y[s] = load_pack_stream<kWidth>(static_cast<const S*>(k.y) + sample[s] * k.y_at.b + within[s]);
    if (k.dy) dy[s] = load_pack_stream<kWidth>(static_cast<const S*>(k.dy) + sample[s] * k.dy_at.b + within[s]);
  }
#pragma unroll
  for (int s = 0; s < kGradientSteps; ++s) {
    if (sample[s] < 0) continue;
    const T dlogdet = dlogdet_of(k, sample[s]);
    Pack<S, kWidth> dx;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const T out = reads_y ? static_cast<T>(Storage<d>::load(y[s][e])) : T(0);
      dx[e] = Storage<d>::store(gradient(out, k.dy ? static_cast<T>(Storage<d>::load(dy[s][e])) : T(0), dlogdet, k));
    }
    store_pack_stream(static_cast<S*>(k.dx) + sample[s] * k.dx_at.b + within[s], dx);
  }
}

template <DType d>
__global__ void __launch_bounds__(kThreads) backward_scattered(const Backward<typename Arithmetic<d>::type> k) {
  using T = typename Arithmetic<d>::type;
  using S = StorageType<d>;
  const bool narrow = k.total < int64_t{1} << 31;
  for (int s = 0; s < kGradientSteps; ++s) {
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * kGradientSteps + s) * kThreads + threadIdx.x;
    if (i >= k.total) break;
    const int64_t row = quotient(i, k.positions, narrow), p = i - row * k.positions;
    const int64_t b = quotient(row, k.channels, narrow), c = row - b * k.channels;
    const auto at = [&](const View& v) { return b * v.b + c * v.c + p * v.p; };
    const T y = k.logit ? static_cast<T>(Storage<d>::load(static_cast<const S*>(k.y)[at(k.y_at)])) : T(0);
    const T dy = k.dy ? static_cast<T>(Storage<d>::load(static_cast<const S*>(k.dy)[at(k.dy_at)])) : T(0);
    static_cast<S*>(k.dx)[at(k.dx_at)] = Storage<d>::store(gradient(y, dy, dlogdet_of(k, b), k));
  }
}

}  // namespace
}  // namespace dequantize
}  // namespace cuda
}  // namespace nf
