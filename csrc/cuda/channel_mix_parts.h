// What the channel mix's kernels share: their arguments and the choice of grids.
#pragma once

#include "../include/channel_mix.h"
#include "../include/scalar_math.h"
#include "mix_tile.h"

namespace nf {
namespace cuda {

// Up to here a thread multiplies whole columns in registers; above, tensor cores.
constexpr int64_t kFewChannels = 24;
// Up to here one pass makes dx, dW and dbias; above, each has its own.
constexpr int64_t kFusedChannels = 64;
// What a block may have on every architecture from sm_80 on.
constexpr int64_t kSharedEverywhere = 99 * 1024;

template <typename T>
struct MixForwardTask {
  TileView x, y;
  int64_t channels, count, positions;
  const T* weight;
  const T* bias;  // or null
};

template <typename T>
struct MixBackwardTask {
  TileView x, dy, dx, rebuilt;
  int64_t channels, count, positions;
  const T* weight;   // null: no dx
  const T* inverse;  // null: x is the input
  const T* bias;     // or null
  T* partial;        // [partials][C * C + C]: of dW, of dbias; null: neither
  bool need_dweight, need_dbias;
};

template <typename T>
MixForwardTask<T> forward_task(const MixForward& k) {
  View x = k.x, y = k.y;
  View* views[] = {&x, &y};
  const Columns columns = join_samples({k.batch, k.positions}, views, 2);
  return {tile_view(x, k.data, k.channels, columns),
          tile_view(y, k.data, k.channels, columns),
          k.channels,
          columns.count(),
          columns.positions,
          static_cast<const T*>(k.weight),
          static_cast<const T*>(k.bias)};
}

template <typename T>
MixBackwardTask<T> backward_task(const MixBackward& k) {
  View x = k.x, dy = k.dy, dx = k.dx.data ? k.dx : k.x, rebuilt = k.inverse ? k.rebuilt : k.x;
  View* views[] = {&x, &dy, &dx, &rebuilt};
  const Columns columns = join_samples({k.batch, k.positions}, views, 4);
  const auto view = [&](const View& v) { return tile_view(v, k.data, k.channels, columns); };
  return {view(x),
          view(dy),
          view(dx),
          view(rebuilt),
          k.channels,
          columns.count(),
          columns.positions,
          k.dx.data ? static_cast<const T*>(k.weight) : nullptr,
          static_cast<const T*>(k.inverse),
          static_cast<const T*>(k.bias),
          nullptr,
          k.dweight != nullptr,
          k.dbias != nullptr};
}

// The partial sums of `partials` blocks (or splits of the columns).
template <typename T>
void make_partials(MixBackwardTask<T>& task, int64_t partials, const Launch& on) {
  if (task.need_dweight || task.need_dbias)
    task.partial = static_cast<T*>(on.scratch(partials * (task.channels + 1) * task.channels * sizeof(T)));
}

template <typename T>
void finish_partials(const MixBackward& k, const MixBackwardTask<T>& task, int64_t partials, const Launch& on) {
  sum_partials<T>(on, task.partial, partials, {k.dweight, k.channels * k.channels}, {k.dbias, k.channels});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// channel_mix_tensor.cu
void mix_forward_tensor(const MixForward& k, const Launch& on);
void mix_backward_tensor(const MixBackward& k, const Launch& on);
// channel_mix_double.cu
void mix_forward_double(const MixForward& k, const Launch& on);
void mix_backward_double(const MixBackward& k, const Launch& on);

}  // namespace cuda
}  // namespace nf
