// The LU composition's products, in double: kRows rows of the left factor in shared memory, a lane to a column of the
// right one, which streams from the cache.
#pragma once

#include "../include/lu_compose.h"
#include "device.h"

namespace nf {
namespace cuda {
namespace lu {
namespace {

constexpr int kMostThreads = 256;
constexpr int kRows = 8;   // of a product
constexpr int kChunk = 8;  // of a transposed factor, staged by a warp
constexpr int kStage = 32 * (kChunk + 1);

inline int threads_for(int channels) { return channels > 128 ? 256 : 128; }

// s_i of matrix k.
template <typename T>
NF_DEVICE double diagonal_at(const LUFactors& lu, int64_t k, int i) {
  const int64_t at = k * lu.channels + i;
  const double sign = lu.sign ? static_cast<double>(static_cast<const T*>(lu.sign)[at]) : 1.0;
  return diagonal_value(lu.diagonal, static_cast<double>(static_cast<const T*>(lu.log_s)[at]), sign, lu.eps);
}

template <typename T>
NF_DEVICE const T* matrix(const void* data, const LUFactors& lu, int64_t k) {
  return static_cast<const T*>(data) + k * lu.channels * lu.channels;
}

// --- products --------------------------------------------------------------------------------------------------------

// Of a factor: all of it, or what lies below (k > n) or above (k < n) the diagonal, which is then given.
enum class Part { whole, below, above };

template <Part part>
NF_DEVICE double part_of(double v, int k, int n, double diagonal) {
  if (part == Part::whole) return v;
  return k == n ? diagonal : (part == Part::below ? k > n : k < n) ? v : 0.0;
}

NF_DEVICE void multiply_add(const double* row, double v, double (&sum)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; r += 2) {
    const Pack<double, 2> pair = load_pack<2>(row + r);
    sum[r] += pair[0] * v;
    sum[r + 1] += pair[1] * v;
  }
}

// sum[r] += sum over k in [k0, k1) of rows[k][r] B(k, n) for the lane's n of the warp's 32 columns from n0;
// B(k, n) = from[k][n], or from[n][k] where `transposed`, through the warp's `stage`. Nothing from column C on.
template <bool transposed, Part part, typename T>
NF_DEVICE void product(const double* rows, const T* from, int channels, int n0, int k0, int k1, double diagonal,
                       T* stage, double (&sum)[kRows]) {
  const int n = n0 + lane();
  if constexpr (!transposed) {
    const T* column = from + (n < channels ? n : 0);
#pragma unroll 4
    for (int k = k0; k < k1; ++k)
      multiply_add(rows + k * kRows,
                   part_of<part>(static_cast<double>(column[static_cast<int64_t>(k) * channels]), k, n, diagonal), sum);
  } else {
    const int own = lane() / kChunk, at = lane() % kChunk;
    for (int k = k0; k < k1; k += kChunk) {
      T values[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const int row = n0 + j * (32 / kChunk) + own;
        values[j] = row < channels && k + at < k1 ? from[static_cast<int64_t>(row) * channels + k + at] : T(0);
      }
      sync_warp();
#pragma unroll
      for (int j = 0; j < kChunk; ++j) stage[(j * (32 / kChunk) + own) * (kChunk + 1) + at] = values[j];
      sync_warp();
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (k + e >= k1) break;
        const double v = static_cast<double>(stage[lane() * (kChunk + 1) + e]);
        multiply_add(rows + (k + e) * kRows, part_of<part>(v, k + e, n, diagonal), sum);
      }
    }
  }
}

}  // namespace
}  // namespace lu
}  // namespace cuda
}  // namespace nf
