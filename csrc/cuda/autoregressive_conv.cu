// Autoregressive convolution on CUDA, and its inverse.
//
// Forward: a thread to a pixel and a few output channels. Inverse: a block to a sample, one wavefront of pixels
// (w + skew h = step) after another with a barrier between; what later wavefronts look at is kept in a ring of the last
// few, in the arithmetic's type, so nothing is read back from the output. Plain multiply-adds, never TF32.

#include <type_traits>

#include "../include/autoregressive_conv.h"
#include "storage.h"

namespace nf {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr size_t kShared = 96 * 1024;  // what every architecture gives a block
constexpr int kHeld = 4;               // inputs of the next wavefront that a thread has under way

template <DType d>
using Arithmetic = std::conditional_t<d == DType::f64, double, float>;
template <typename T>
constexpr int kPack = 16 / sizeof(T);  // output channels that one load of weights serves

// Where weights and ring are.
enum class Place { shared, ring_shared, global };

template <typename T>
struct ConvTask {
  View x, y;
  int64_t batch;
  int channels, padded, height, width;  // padded: channels up to whole packs
  ConvForm form;
  const T* weight;  // [taps][out][in], or [taps][in][padded] where it stays in global memory
  const T* bias;
  T* ring;       // global memory for it, of each block
  int64_t kept;  // elements of a block's ring and stages
  int slots, pitch;
};

// Channels [first, first + count) of the weights as [taps][in][count], from [taps][out][in]; zeros past the last.
template <typename T>
NF_DEVICE void pack_weights(const ConvTask<T>& k, int first, int count, int64_t at, int64_t step, T* to) {
  const int channels = k.channels;
  const int64_t total = int64_t{tap_count(k.form)} * count * channels;
  for (int64_t i = at; i < total; i += step) {
    const int c = static_cast<int>(i % channels), o = static_cast<int>(i / channels % count);
    const int64_t t = i / channels / count;
    to[(t * channels + c) * count + o] =
        first + o < channels ? k.weight[(t * channels + first + o) * channels + c] : T(0);
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void conv_pack(ConvTask<T> k, T* to) {
  pack_weights(k, 0, k.padded, blockIdx.x * int64_t{kThreads} + threadIdx.x, gridDim.x * int64_t{kThreads}, to);
}

template <DType d>
NF_DEVICE const StorageType<d>* source(const View& v, int64_t b) {
  return static_cast<const StorageType<d>*>(v.data) + b * v.b;
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <DType d, int packs, bool in_shared>
__global__ __launch_bounds__(kThreads, 2) void conv_product(ConvTask<Arithmetic<d>> k, int groups) {
  using T = Arithmetic<d>;
  constexpr int n = kPack<T>, count = packs * n;
  NF_SHARED(T, shared);
  const int first = static_cast<int>(blockIdx.x) % groups * count;
  if constexpr (in_shared) {
    pack_weights(k, first, count, threadIdx.x, kThreads, shared);
    sync_block();
  }
  const int64_t pixels = int64_t{k.height} * k.width;
  const int64_t i = blockIdx.x / groups * int64_t{kThreads} + threadIdx.x;
  if (i >= k.batch * pixels) return;
  const int64_t b = i / pixels, p = i % pixels;
  const int h = static_cast<int>(p / k.width), w = static_cast<int>(p % k.width);
  const int sign = k.form.reverse ? 1 : -1;
  T acc[packs][n];
#pragma unroll
  for (int j = 0; j < packs; ++j)
#pragma unroll
    for (int r = 0; r < n; ++r) {
      const int o = first + j * n + r;
      acc[j][r] = k.bias && o < k.channels ? k.bias[o] : T(0);
    }
  const auto* x = source<d>(k.x, b);
  const int taps = tap_count(k.form), pitch = in_shared ? count : k.padded;
  for (int t = 0; t < taps; ++t) {
    int dh, dw;
    tap_offset(k.form, t, &dh, &dw);
    const int row = h + sign * dh, column = w + sign * dw;
    if (row < 0 || row >= k.height || column < 0 || column >= k.width) continue;
    const auto* from = x + (int64_t{row} * k.width + column) * k.x.p;
    const T* matrix = in_shared ? shared + t * k.channels * pitch : k.weight + int64_t{t} * k.channels * pitch + first;
#pragma unroll 4
    for (int c = 0; c < k.channels; ++c) {
      const T in = Storage<d>::load(*from);
      from += k.x.c;
#pragma unroll
      for (int j = 0; j < packs; ++j) {
        const auto v = load_pack<n>(matrix + j * n);
#pragma unroll
        for (int r = 0; r < n; ++r) acc[j][r] += v[r] * in;
      }
      matrix += pitch;
    }
  }
  auto* y = static_cast<StorageType<d>*>(k.y.data) + b * k.y.b + p * k.y.p;
#pragma unroll
  for (int j = 0; j < packs; ++j)
#pragma unroll
    for (int r = 0; r < n; ++r) {
      const int o = first + j * n + r;
      if (o < k.channels) y[o * k.y.c] = Storage<d>::store(acc[j][r]);
    }
}

// --- inverse ---------------------------------------------------------------------------------------------------------

// The pixel at row h of a wavefront, in the order pixels are made, as the image counts them.
NF_DEVICE int64_t pixel_of(int h, int w, int height, int width, bool reverse) {
  const int64_t p = int64_t{h} * width + w;
  return reverse ? int64_t{height} * width - 1 - p : p;
}

template <DType d, Place place>
__global__ __launch_bounds__(kThreads, 2) void conv_solve(ConvTask<Arithmetic<d>> k) {
  using T = Arithmetic<d>;
  constexpr int n = kPack<T>;
  NF_SHARED(T, shared);
  const int channels = k.channels, height = k.height, width = k.width, pitch = k.pitch;
  const int taps = tap_count(k.form), skew = skew_of(k.form), top = k.form.rows / 2;
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const T* weight = k.weight;
  T* ring = k.ring + blockIdx.x * k.kept;  // [slots][channels][pitch]: rows begin with `top` zeros
  if constexpr (place == Place::shared) {
    pack_weights(k, 0, k.padded, tid, threads, shared);
    weight = shared;
    ring = shared + taps * channels * k.padded;
  } else if constexpr (place == Place::ring_shared) {
    ring = shared;
  }
  const int wavefront = channels * pitch, entries = channels * height;
  T* stage = ring + int64_t{k.slots} * wavefront;  // [2][channels][height]: the input of a wavefront
  const int steps = width + skew * (height - 1), items = k.padded / n * height;
  const int64_t along = k.form.reverse ? -k.x.p : k.x.p;

  for (int64_t b = blockIdx.x; b < k.batch; b += gridDim.x) {
    const auto* x = source<d>(k.x, b);
    auto* y = static_cast<StorageType<d>*>(k.y.data) + b * k.y.b;
    const auto input = [&](int c, int h, int w) {
      return Storage<d>::load(x[c * k.x.c + pixel_of(h, w, height, width, k.form.reverse) * k.x.p]);
    };
    sync_block();
    for (int i = tid; i < k.slots * wavefront; i += threads) ring[i] = T(0);
    for (int i = tid; i < entries; i += threads) {  // of wavefront 0: the pixel at (0, 0)
      const int h = i % height;
      if (h == 0) stage[i] = input(i / height, 0, 0);
    }
    // This thread's first inputs: where they would be in wavefront 0, and at which column.
    int64_t from[kHeld];
    int column[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int i = tid + j * threads, h = i % height;
      column[j] = i < entries ? -skew * h : -steps - 1;
      from[j] = (i / height) * k.x.c + pixel_of(h, -skew * h, height, width, k.form.reverse) * k.x.p;
    }
    sync_block();

    int slot = 0;
    for (int step = 0; step < steps; ++step) {
      StorageType<d> held[kHeld];
      const int next = step + 1;
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int w = column[j] + next;
        if (w >= 0 && w < width) held[j] = x[from[j] + next * along];
      }
      const T* given = stage + (step & 1) * entries;
      T* made = ring + int64_t{slot} * wavefront;
      for (int i = tid; i < items; i += threads) {
        const int h = i % height, o = i / height * n, w = step - skew * h;
        T acc[n];
#pragma unroll
        for (int r = 0; r < n; ++r) acc[r] = T(0);
        const bool exists = w >= 0 && w < width;
        if (exists) {
#pragma unroll
          for (int r = 0; r < n; ++r) acc[r] = k.bias && o + r < channels ? k.bias[o + r] : T(0);
          for (int t = 0; t < taps; ++t) {
            const T* in = given + h;
            int jump = height;
            if (t > 0) {
              int dh, dw;
              tap_offset(k.form, t, &dh, &dw);
              int at = slot - skew * dh - dw;
              at = at < 0 ? at + k.slots : at;
              in = ring + int64_t{at} * wavefront + (h - dh + top);
              jump = pitch;
            }
            const T* matrix = weight + int64_t{t} * channels * k.padded + o;
#pragma unroll 4
            for (int c = 0; c < channels; ++c) {
              const T value = in[int64_t{c} * jump];
              const auto v = load_pack<n>(matrix + int64_t{c} * k.padded);
#pragma unroll
              for (int r = 0; r < n; ++r) acc[r] += v[r] * value;
            }
          }
        }
        const int64_t p = pixel_of(h, w, height, width, k.form.reverse);
#pragma unroll
        for (int r = 0; r < n; ++r)
          if (o + r < channels) {
            made[(o + r) * pitch + h + top] = acc[r];
            if (exists) y[(o + r) * k.y.c + p * k.y.p] = Storage<d>::store(acc[r]);
          }
      }
      T* later = stage + (next & 1) * entries;
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int w = column[j] + next;
        if (w >= 0 && w < width) later[tid + j * threads] = Storage<d>::load(held[j]);
      }
      for (int i = tid + kHeld * threads; i < entries; i += threads) {
        const int h = i % height, w = next - skew * h;
        if (w >= 0 && w < width) later[i] = input(i / height, h, w);
      }
      slot = slot + 1 == k.slots ? 0 : slot + 1;
      sync_block();
    }
  }
}

// --- launching -------------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <typename T>
void pack_to_scratch(ConvTask<T>& task, const Launch& on) {
  const int64_t total = int64_t{tap_count(task.form)} * task.channels * task.padded;
  T* packed = static_cast<T*>(on.scratch(total * sizeof(T)));
  const int64_t blocks = divide_up(total, kThreads);
  launch(conv_pack<T>, on, blocks < 1024 ? blocks : 1024, kThreads, 0, task, packed);
  task.weight = packed;
}

template <DType d, int packs>
void launch_product(const ConvTask<Arithmetic<d>>& task, const Launch& on) {
  using T = Arithmetic<d>;
  constexpr int count = packs * kPack<T>;
  const int64_t tiles = divide_up(task.batch * task.height * task.width, kThreads);
  const int groups = static_cast<int>(divide_up(task.channels, count));
  const int64_t bytes = int64_t{tap_count(task.form)} * task.channels * count * sizeof(T);
  if (bytes <= static_cast<int64_t>(kShared)) {
    launch(conv_product<d, packs, true>, on, tiles * groups, kThreads, bytes, task, groups);
  } else {
    ConvTask<T> packed = task;
    packed.padded = groups * count;
    pack_to_scratch(packed, on);
    launch(conv_product<d, packs, false>, on, tiles * groups, kThreads, 0, packed, groups);
  }
}

template <DType d>
void run_product(const ConvTask<Arithmetic<d>>& task, const Launch& on) {
  // As many channels at once as leave the fewest idle.
  const int64_t need = divide_up(task.channels, kPack<Arithmetic<d>>);
  int best = 4;
  for (int packs = 3; packs >= 1; --packs)
    if (divide_up(need, packs) * packs < divide_up(need, best) * best) best = packs;
  best == 4   ? launch_product<d, 4>(task, on)
  : best == 3 ? launch_product<d, 3>(task, on)
  : best == 2 ? launch_product<d, 2>(task, on)
              : launch_product<d, 1>(task, on);
}

template <DType d>
void run_solve(ConvTask<Arithmetic<d>> task, const Launch& on) {
  using T = Arithmetic<d>;
  const int skew = skew_of(task.form);
  task.slots = skew * (task.form.rows / 2) + task.form.columns / 2 + 1;
  task.pitch = task.height + task.form.rows / 2;
  task.kept = int64_t{task.channels} * (int64_t{task.slots} * task.pitch + 2 * task.height);
  const int64_t limit = kShared / sizeof(T);
  const int64_t weights = int64_t{tap_count(task.form)} * task.channels * task.padded;
  const int64_t items = int64_t{task.padded} / kPack<T> * task.height;
  const int threads = items >= kThreads ? kThreads : items > 64 ? static_cast<int>(divide_up(items, 32) * 32) : 64;
  const int64_t most = 4 * int64_t{on.multiprocessors}, blocks = task.batch < most ? task.batch : most;
  if (weights + task.kept <= limit) {
    launch(conv_solve<d, Place::shared>, on, blocks, threads, (weights + task.kept) * sizeof(T), task);
    return;
  }
  pack_to_scratch(task, on);
  if (task.kept <= limit) {
    launch(conv_solve<d, Place::ring_shared>, on, blocks, threads, task.kept * sizeof(T), task);
  } else {
    task.ring = static_cast<T*>(on.scratch(blocks * task.kept * sizeof(T)));
    launch(conv_solve<d, Place::global>, on, blocks, threads, 0, task);
  }
}

template <DType d>
void forward(const AutoregressiveConv& k, const Launch& on) {
  using T = Arithmetic<d>;
  ConvTask<T> task{};
  task.x = k.x;
  task.y = k.y;
  task.batch = k.batch;
  task.channels = static_cast<int>(k.channels);
  task.padded = static_cast<int>(divide_up(k.channels, kPack<T>) * kPack<T>);
  task.height = static_cast<int>(k.height);
  task.width = static_cast<int>(k.width);
  task.form = k.form;
  task.weight = static_cast<const T*>(k.weight);
  task.bias = static_cast<const T*>(k.bias);
  k.form.solve ? run_solve<d>(task, on) : run_product<d>(task, on);
}

}  // namespace

void autoregressive_conv_forward(const AutoregressiveConv& k, const Launch& on) {
  if (k.batch * k.channels * k.height * k.width == 0) return;
  switch (k.data) {
    case DType::f32:
      return forward<DType::f32>(k, on);
    case DType::f64:
      return forward<DType::f64>(k, on);
    case DType::bf16:
      return forward<DType::bf16>(k, on);
    case DType::f16:
      return forward<DType::f16>(k, on);
  }
}

}  // namespace cuda
}  // namespace nf
