// Matrix products over tiles of columns (mix_tile.h) on tensor cores at fp32's accuracy: 3xTF32.
//
// An fp32 number is the sum of a TF32 number and a rest of at most 12 bits, of which TF32 keeps 11: big * big and both
// mixed products leave an error of 2^-22 of each product. Tensor cores add with truncation, so long sums (dW over the
// columns) are made of short ones that are added in plain fp32. An infinite element has the rest Inf - Inf: the sums it
// enters become NaN, those of its own column (its own channel's in dW) and no others. So do elements within 2^-12 of
// fp32's largest.
//
// A tile's pitch is 8 or 24 modulo 32. Products take a fragment's k from different rows, single words at
// 8 t + g (t < 4, g < 8): 32 banks. dW takes k along the rows, pairs at 8 g + 2 t for 16 lanes at a time: 32 banks; k's
// order within a fragment is free, so the pair serves as k = t and k = t + 4.
#pragma once

#include "../include/scalar_math.h"
#include "mix_tile.h"

namespace nf {

NF_FN constexpr int tile_pitch(int columns) { return (columns + 15) / 16 * 16 + 8; }

// In three instructions where to_tf32 alone takes three: a NaN whose bits wrap around to zero here returns in the rest.
NF_DEVICE void split_tf32(float v, uint32_t& big, uint32_t& rest) {
  std::memcpy(&big, &v, sizeof big);
  big = (big + 0x1000u) & ~0x1fffu;  // to nearest
  const float left = v - from_tf32(big);
  std::memcpy(&rest, &left, sizeof rest);
#ifdef NF_EMULATED
  rest &= left == left ? ~0x1fffu : ~0u;  // tensor cores do not look at these bits
#endif
}

NF_DEVICE void mma_3xtf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&a_rest)[4], const uint32_t (&b)[2],
                          const uint32_t (&b_rest)[2]) {
  mma_tf32(d, a_rest, b);
  mma_tf32(d, a, b_rest);
  mma_tf32(d, a, b);
}

// The matrix a[row][k] = weight[row0 + row, k0 + k] (or its transpose's) as 16 x 8 fragments:
// [m_tiles][k_tiles][lane][4] floats, zero outside the matrix. A fragment is then one 16-byte load.
NF_DEVICE float fragment_element(const float* weight, int64_t channels, bool transposed, int64_t row0, int64_t k0,
                                 int k_tiles, int i) {
  const int in_lane = i % 4, at = i / 4 % 32, kt = i / 128 % k_tiles, mt = i / 128 / k_tiles;
  const int64_t row = row0 + mt * 16 + at / 4 + in_lane % 2 * 8, k = k0 + kt * 8 + at % 4 + in_lane / 2 * 4;
  if (row >= channels || k >= channels) return 0.0f;
  return transposed ? weight[k * channels + row] : weight[row * channels + k];
}

// acc[i][j] += a b for the M x N fragments at rows 16 i and columns 8 j: `a` points to the first fragment row's
// [k_tiles] fragments, `b` to the tile at the first column. Where `shifted`, b is less shift[k].
template <bool shifted, int unrolled = 2, int M, int N>
NF_DEVICE void multiply_tile(const float* a, int k_tiles, const float* b, int pitch, const float* shift,
                             float (&acc)[M][N][4]) {
  const int g = lane() / 4, t = lane() % 4;
  a += lane() * 4;
  b += t * pitch + g;
#pragma unroll unrolled
  for (int k = 0; k < k_tiles; ++k, a += 128, b += 8 * pitch) {
    uint32_t big[N][2], rest[N][2];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float low = b[j * 8], high = b[j * 8 + 4 * pitch];
      if constexpr (shifted) low -= shift[k * 8 + t], high -= shift[k * 8 + t + 4];
      split_tf32(low, big[j][0], rest[j][0]);
      split_tf32(high, big[j][1], rest[j][1]);
    }
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const Pack<float, 4> raw = load_pack<4>(a + i * k_tiles * 128);
      uint32_t a_big[4], a_rest[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) split_tf32(raw[e], a_big[e], a_rest[e]);
#pragma unroll
      for (int j = 0; j < N; ++j) mma_3xtf32(acc[i][j], a_big, a_rest, big[j], rest[j]);
    }
  }
}

// sum[i][j] += y x^T over k_tiles * 8 columns: `y` points to the tile at the first of M * 16 rows, `x` at the first of
// N * 8, both at the first column.
template <int M, int N>
NF_DEVICE void multiply_rows(const float* y, const float* x, int pitch, int k_tiles, float (&sum)[M][N][4]) {
  const int g = lane() / 4, t = lane() % 4;
  y += g * pitch + 2 * t;
  x += g * pitch + 2 * t;
  float acc[M][N][4] = {};
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k, y += 8, x += 8) {
    uint32_t big[N][2], rest[N][2];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Pack<float, 2> raw = load_pack<2>(x + j * 8 * pitch);
      split_tf32(raw[0], big[j][0], rest[j][0]);
      split_tf32(raw[1], big[j][1], rest[j][1]);
    }
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const Pack<float, 2> upper = load_pack<2>(y + i * 16 * pitch), lower = load_pack<2>(y + (i * 16 + 8) * pitch);
      uint32_t a_big[4], a_rest[4];
      split_tf32(upper[0], a_big[0], a_rest[0]);
      split_tf32(lower[0], a_big[1], a_rest[1]);
      split_tf32(upper[1], a_big[2], a_rest[2]);
      split_tf32(lower[1], a_big[3], a_rest[3]);
#pragma unroll
      for (int j = 0; j < N; ++j) mma_3xtf32(acc[i][j], a_big, a_rest, big[j], rest[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][j][e] += acc[i][j][e];
}

// The fragments' values into a tile, plus `bias[row]` where there is one.
template <int M, int N>
NF_DEVICE void write_fragments(const float (&acc)[M][N][4], float* tile, int pitch, const float* bias) {
  const int g = lane() / 4, t = lane() % 4;
  tile += g * pitch + 2 * t;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    const float upper = bias ? bias[i * 16 + g] : 0.0f, lower = bias ? bias[i * 16 + 8 + g] : 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Pack<float, 2> pair;
      pair[0] = acc[i][j][0] + upper;
      pair[1] = acc[i][j][1] + upper;
      store_pack<2>(tile + i * 16 * pitch + j * 8, pair);
      pair[0] = acc[i][j][2] + lower;
      pair[1] = acc[i][j][3] + lower;
      store_pack<2>(tile + (i * 16 + 8) * pitch + j * 8, pair);
    }
  }
}

}  // namespace nf
