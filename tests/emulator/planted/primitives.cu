// The emulator's primitives, each used in the plainest way, for comparison with plain loops.

#include "device.h"
#include "planted.h"
#include "storage.h"

namespace nf {
namespace planted {
namespace {

// For each thread, six rows: shuffle from lane 5, from lane 31 - lane; xor 1, xor 21; down 1, down 16.
template <typename T>
__global__ void shuffle_rows(const T* in, T* out) {
  const int n = blockDim.x, t = threadIdx.x;
  const T v = in[t];
  out[t] = shuffle(v, 5);
  out[n + t] = shuffle(v, 31 - lane());
  out[2 * n + t] = shuffle_xor(v, 1);
  out[3 * n + t] = shuffle_xor(v, 21);
  out[4 * n + t] = shuffle_down(v, 1);
  out[5 * n + t] = shuffle_down(v, 16);
}

__global__ void vote_rows(const float* in, float* out) {
  const int n = blockDim.x, t = threadIdx.x;
  out[t] = vote_any(in[t] > 0);
  out[n + t] = vote_all(in[t] > 0);
}

// The turn each thread gets, before and after a barrier: a race on purpose.
__global__ void turn_rows(int* out) {
  NF_SHARED(int, turn);
  const int n = blockDim.x, t = threadIdx.x;
  int* mine = out + 2 * n * blockIdx.x;
  if (turn[0] == -1) turn[0] = turn[1] = 0;  // fresh shared memory has all bits set
  mine[t] = turn[0]++;
  sync_block();
  mine[n + t] = turn[1]++;
}

// d = a b for a [16, k], b [k, 8], row-major, one warp; `terms` 1: plain TF32, 3: with the rests of both.
template <int terms>
__global__ void matrix(const float* a, const float* b, float* d, int k) {
  const int g = lane() / 4, t = lane() % 4;
  float sum[4] = {0, 0, 0, 0};
  for (int base = 0; base < k; base += 8) {
    const float va[4] = {a[g * k + base + t], a[(g + 8) * k + base + t], a[g * k + base + t + 4],
                         a[(g + 8) * k + base + t + 4]};
    const float vb[2] = {b[(base + t) * 8 + g], b[(base + t + 4) * 8 + g]};
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    for (int i = 0; i < 4; ++i) {
      a_high[i] = to_tf32(va[i]);
      a_low[i] = to_tf32(va[i] - from_tf32(a_high[i]));
    }
    for (int i = 0; i < 2; ++i) {
      b_high[i] = to_tf32(vb[i]);
      b_low[i] = to_tf32(vb[i] - from_tf32(b_high[i]));
    }
    if constexpr (terms == 3) {
      mma_tf32(sum, a_low, b_high);
      mma_tf32(sum, a_high, b_low);
    }
    mma_tf32(sum, a_high, b_high);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// out = in + in, through the bits as they are: what a forgotten rounding does.
template <bool fault>
__global__ void unrounded(const float* in, float* out, int n) {
  const float v = in[threadIdx.x];
  uint32_t word = to_tf32(v);
  if constexpr (fault) std::memcpy(&word, &v, sizeof word);
  const uint32_t a[4] = {word, word, word, word}, b[2] = {word, word};
  float sum[4] = {0, 0, 0, 0};
  mma_tf32(sum, a, b);
  if (static_cast<int>(threadIdx.x) < n) out[threadIdx.x] = from_tf32(to_tf32(v)) + (sum[0] - sum[0]);
}

template <DType d>
__global__ void convert(const float* in, StorageType<d>* stored, float* back, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  stored[i] = Storage<d>::store(in[i]);
  back[i] = Storage<d>::load(stored[i]);
}

template <int N, typename T>
__global__ void copy_packs(const T* in, T* out) {
  const int i = threadIdx.x * N;
  store_pack(out + i, load_pack<N>(in + i));
  const int j = (blockDim.x + threadIdx.x) * N;
  store_pack_stream(out + j, load_pack_stream<N>(in + j));
}

template <DType d>
void convert_all(const float* in, void* stored, float* back, int n) {
  launch(convert<d>, Launch{}, (n + 255) / 256, 256, 0, in, static_cast<StorageType<d>*>(stored), back, n);
}

template <typename T>
void shuffle_all(const void* in, void* out, int threads) {
  launch(shuffle_rows<T>, Launch{}, 1, threads, 0, static_cast<const T*>(in), static_cast<T*>(out));
}

template <int N, typename T>
void copy_all(const void* in, void* out) {
  launch(copy_packs<N, T>, Launch{}, 1, 32, 0, static_cast<const T*>(in), static_cast<T*>(out));
}

}  // namespace

void unrounded_operand(bool fault, const float* in, float* out, int n) {
  launch(fault ? unrounded<true> : unrounded<false>, Launch{}, 1, n, 0, in, out, n);
}

void shuffles(int type, const void* in, void* out, int threads) {
  using F = void (*)(const void*, void*, int);
  static const F table[] = {shuffle_all<float>, shuffle_all<double>, shuffle_all<int>, shuffle_all<uint32_t>};
  table[type](in, out, threads);
}

void votes(const float* in, float* out, int threads) { launch(vote_rows, Launch{}, 1, threads, 0, in, out); }

void turns(int* out, int64_t blocks, int threads, size_t shared_bytes) {
  launch(turn_rows, Launch{}, blocks, threads, shared_bytes, out);
}

void product(int terms, const float* a, const float* b, float* d, int k) {
  launch(terms == 3 ? matrix<3> : matrix<1>, Launch{}, 1, 32, 0, a, b, d, k);
}

void conversions(bool half, const float* in, void* stored, float* back, int n) {
  (half ? convert_all<DType::f16> : convert_all<DType::bf16>)(in, stored, back, n);
}

void packs(int which, const void* in, void* out) {
  using F = void (*)(const void*, void*);
  static const F table[] = {copy_all<4, float>, copy_all<2, double>,        copy_all<8, __half>,
                            copy_all<8, float>, copy_all<1, __nv_bfloat16>, copy_all<2, float>};
  table[which](in, out);
}

}  // namespace planted
}  // namespace nf
