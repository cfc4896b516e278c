// The channel mix in double precision: plain products over tiles in shared memory, any number of channels. dW, dx and
// the rebuilt input are made by a kernel each.

#include "channel_mix_parts.h"

namespace nf {
namespace cuda {
namespace {

constexpr int kThreads = 256, kSide = 64;  // results to a block: 64 x 64, 4 x 4 to a thread
constexpr int kDepth = 16;                 // terms of each sum to a step
constexpr int kPitch = kSide + 2;          // rows begin on 16 bytes
constexpr int kRowPitch = kDepth + 2;

// y = matrix (or its transpose) (x - shift) + bias.
__global__ __launch_bounds__(kThreads) void product(MixForwardTask<double> k, const double* shift, int transposed,
                                                    int bands) {
  NF_SHARED(double,
            matrix);  // [kDepth][kSide + 2], transposed; then the tile [kDepth][kPitch]; the result [kSide][kPitch]
  double* tile = matrix + kDepth * kPitch;
  double* result = tile + kDepth * kPitch;
  const int tid = static_cast<int>(threadIdx.x), across = tid % 16, down = tid / 16 * 4;
  const TilePlace at = tile_place(blockIdx.x / bands * int64_t{kSide}, k.count, k.positions);
  const int64_t row = static_cast<int>(blockIdx.x) % bands * int64_t{kSide};
  double acc[4][4] = {};
  for (int64_t c0 = 0; c0 < k.channels; c0 += kDepth) {
    load_tile<DType::f64, kSide>(k.x, at, k.channels, c0, kDepth, tile, kPitch);
    copy_commit();
    for (int i = tid; i < kDepth * kSide; i += kThreads) {
      // Neighbouring threads read neighbouring elements of the matrix either way.
      const int c = transposed ? i / kSide : i % kDepth, o = transposed ? i % kSide : i / kDepth;
      const bool exists = row + o < k.channels && c0 + c < k.channels;
      matrix[c * kPitch + o] = !exists      ? 0.0
                               : transposed ? k.weight[(c0 + c) * k.channels + row + o]
                                            : k.weight[(row + o) * k.channels + c0 + c];
    }
    copy_wait<0>();
    sync_block();
    const int depth = k.channels - c0 < kDepth ? static_cast<int>(k.channels - c0) : kDepth;
#pragma unroll 2
    for (int c = 0; c < depth; ++c) {
      const double less = shift ? shift[c0 + c] : 0.0;
      double w[4], x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        w[e] = matrix[c * kPitch + down + e], x[e] = tile[c * kPitch + across + 16 * e] - less;
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int f = 0; f < 4; ++f) acc[e][f] += w[e] * x[f];
    }
    sync_block();
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const double start = k.bias && row + down + e < k.channels ? k.bias[row + down + e] : 0.0;
#pragma unroll
    for (int f = 0; f < 4; ++f) result[(down + e) * kPitch + across + 16 * f] = acc[e][f] + start;
  }
  sync_block();
  store_tile<DType::f64, kSide>(k.y, at, k.channels, row, kSide, result, kPitch);
}

// 64 x 64 of dW at this block's place, and of dbias; blocks that share a place take turns at the columns.
__global__ __launch_bounds__(kThreads) void outer(MixBackwardTask<double> k, int places) {
  NF_SHARED(double, dy);  // [kSide][kRowPitch], then x's
  double* x = dy + kSide * kRowPitch;
  const int tid = static_cast<int>(threadIdx.x), across = tid % 16, down = tid / 16;
  const int place = static_cast<int>(blockIdx.x) % (places * places),
            turn = static_cast<int>(blockIdx.x) / (places * places);
  const int64_t dy_first = place / places * kSide, x_first = place % places * kSide;
  const bool need_dbias = k.need_dbias && x_first == 0;
  if (!k.need_dweight && !need_dbias) return;
  double acc[4][4] = {}, sum = 0.0;
  const int64_t step = gridDim.x / (places * places) * int64_t{kDepth};
  for (int64_t first = turn * int64_t{kDepth}; first < k.count; first += step) {
    const TilePlace at = tile_place(first, k.count, k.positions);
    load_tile<DType::f64, kDepth>(k.dy, at, k.channels, dy_first, kSide, dy, kRowPitch);
    if (k.need_dweight) load_tile<DType::f64, kDepth>(k.x, at, k.channels, x_first, kSide, x, kRowPitch);
    copy_commit();
    copy_wait<0>();
    sync_block();
    if (k.need_dweight) {
#pragma unroll 2
      for (int n = 0; n < kDepth; ++n) {
        double a[4], b[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          a[e] = dy[(down + 16 * e) * kRowPitch + n], b[e] = x[(across + 16 * e) * kRowPitch + n];
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int f = 0; f < 4; ++f) acc[e][f] += a[e] * b[f];
      }
    }
    if (need_dbias && tid < kSide)
      for (int n = 0; n < kDepth; ++n) sum += dy[tid * kRowPitch + n];
    sync_block();
  }
  double* partial = k.partial + turn * (k.channels + 1) * k.channels;
  if (k.need_dweight) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const int64_t o = dy_first + down + 16 * e, c = x_first + across + 16 * f;
        if (o < k.channels && c < k.channels) partial[o * k.channels + c] = acc[e][f];
      }
  }
  if (need_dbias && tid < kSide && dy_first + tid < k.channels) partial[k.channels * k.channels + dy_first + tid] = sum;
}

void launch_product(const MixForwardTask<double>& task, const double* shift, bool transposed, const Launch& on) {
  const int bands = static_cast<int>(ceil_div(task.channels, kSide));
  launch(product, on, ceil_div(task.count, kSide) * bands, kThreads, (2 * kDepth + kSide) * kPitch * sizeof(double),
         task, shift, transposed, bands);
}

}  // namespace

void mix_forward_double(const MixForward& k, const Launch& on) {
  launch_product(forward_task<double>(k), nullptr, false, on);
}

void mix_backward_double(const MixBackward& k, const Launch& on) {
  MixBackwardTask<double> task = backward_task<double>(k);
  const auto make = [&](const TileView& from, const TileView& to, const double* matrix) {
    return MixForwardTask<double>{from, to, task.channels, task.count, task.positions, matrix, nullptr};
  };
  if (task.weight) launch_product(make(task.dy, task.dx, task.weight), nullptr, true, on);
  if (task.inverse) {
    launch_product(make(task.x, task.rebuilt, task.inverse), task.bias, false, on);
    task.x = task.rebuilt;
  }
  if (!task.need_dweight && !task.need_dbias) return;
  const int64_t places = ceil_div(task.channels, kSide);
  // A turn of fewer columns would cost more in partial sums than it makes.
  const int64_t turns =
      at_most(ceil_div(task.count, 8 * kDepth), at_least(kMultiprocessors * 4 / (places * places), 1));
  make_partials(task, turns, on);
  launch(outer, on, turns * places * places, kThreads, 2 * kSide * kRowPitch * sizeof(double), task,
         static_cast<int>(places));
  finish_partials(k, task, turns, on);
}

}  // namespace cuda
}  // namespace nf
