// Dequantisation on CUDA: chooses how samples are walked and cut, by shapes and layouts alone.

#include "dequantize_kernels.h"
#include "extent.h"

namespace nf {
namespace cuda {
namespace dequantize {
namespace {

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <typename T>
void sum_forward(const Forward<T>& k, T* logdet, const Launch& on) {
  launch(sum_parts<T>, on, divide_up(k.batch, kWarps), kThreads, 0, static_cast<const T*>(k.out), k.running,
         k.running_stride, logdet, k.batch, k.parts);
}

template <DType d, bool bytes>
void forward(const DequantizeForward& io, const Launch& on) {
  using T = typename Arithmetic<d>::type;
  Forward<T> k{};
  T* logdet = static_cast<T*>(io.logdet);
  k.x = io.x.data;
  k.y = io.y.data;
  k.key = io.key;
  k.running = static_cast<const T*>(io.logdet_in);
  k.running_stride = io.logdet_in_stride;
  k.from = io.x;
  k.to = io.y;
  k.bytes = bytes;
  k.logit = io.alpha >= 0;
  k.samples = io.batch;
  k.grey = grey_constants<T>(io.levels, io.alpha, d);
  Extent extent{io.batch, io.channels, io.positions};
  View* views[] = {&k.from, &k.to};
  clean(extent, views, 2);
  collapse(extent, views, 2, false);
  if (!k.logit) join_samples(extent, views, 2);
  k.batch = extent.batch;
  k.channels = extent.channels;
  k.positions = extent.positions;
  k.elements = extent.elements();
  k.out = logdet;
  if (k.batch * k.elements == 0) {
    k.batch = io.batch;
    sum_forward(k, logdet, on);
    return;
  }
  const size_t sums = 16 * kWarps;
  const bool runs = k.elements >= kChunk && is_run(extent, k.from, k.x, bytes ? 1 : size_of(d)) &&
                    is_run(extent, k.to, k.y, size_of(d));
  const int64_t quads = k.elements / 4 + 2;
  if (runs) {
    k.group = kThreads;
    k.parts = static_cast<int>(divide_up(k.elements, kBlockChunks * kChunk));
  } else {
    k.group = 1;
    while (k.group < 64 && k.group < quads) k.group *= 2;
    k.group = k.group > 32 ? kThreads : k.group;
    k.parts = static_cast<int>(divide_up(quads, k.group * kThreadQuads));
    k.by_channel = k.from.c == 1 && k.channels > 1 && k.positions % 4 == 0;
  }
  if (k.logit && k.parts > 1) k.out = static_cast<T*>(on.scratch(k.batch * k.parts * sizeof(T)));
  if (runs)
    launch(forward_runs<d, bytes>, on, k.batch * k.parts, kThreads, sums + (bytes ? kWarps * kChunk : 0), k);
  else
    launch(forward_scattered<d>, on, divide_up(k.batch * k.parts, kThreads / k.group), kThreads, sums, k);
  if (k.logit && k.parts > 1) sum_forward(k, logdet, on);
}

template <DType d>
void backward(const DequantizeBackward& io, const Launch& on) {
  using T = typename Arithmetic<d>::type;
  Backward<T> k{};
  k.y = io.y.data;
  k.dy = io.dy.data;
  k.dx = io.dx.data;
  k.dlogdet = static_cast<const T*>(io.dlogdet);
  k.dlogdet_stride = io.dlogdet_stride;
  k.y_at = io.y;
  k.dy_at = io.dy;
  k.dx_at = io.dx;
  k.logit = io.alpha >= 0;
  k.grey = grey_constants<T>(io.levels, io.alpha, d);
  Extent extent{io.batch, io.channels, io.positions};
  View* views[] = {&k.y_at, &k.dx_at, &k.dy_at};
  const int n = k.dy ? 3 : 2;
  clean(extent, views, n);
  collapse(extent, views, n, true);
  k.elements = extent.elements();
  k.channels = extent.channels;
  k.positions = extent.positions;
  k.total = extent.batch * k.elements;
  const bool runs = is_run(extent, k.y_at, k.y, size_of(d)) && is_run(extent, k.dx_at, k.dx, size_of(d)) &&
                    (!k.dy || is_run(extent, k.dy_at, k.dy, size_of(d)));
  if (runs)
    launch(backward_runs<d>, on, divide_up(k.total, kThreads * kGradientSteps * (16 / size_of(d))), kThreads, 0, k);
  else
    launch(backward_scattered<d>, on, divide_up(k.total, kThreads * kGradientSteps), kThreads, 0, k);
}

}  // namespace
}  // namespace dequantize

void dequantize_forward(const DequantizeForward& io, const Launch& on) {
  using namespace dequantize;
  using Function = void (*)(const DequantizeForward&, const Launch&);
  static const Function table[4][2] = {{forward<DType::f32, false>, forward<DType::f32, true>},
                                       {forward<DType::f64, false>, forward<DType::f64, true>},
                                       {forward<DType::bf16, false>, forward<DType::bf16, true>},
                                       {forward<DType::f16, false>, forward<DType::f16, true>}};
  table[static_cast<int>(io.data)][io.bytes](io, on);
}

void dequantize_backward(const DequantizeBackward& io, const Launch& on) {
  using namespace dequantize;
  using Function = void (*)(const DequantizeBackward&, const Launch&);
  static const Function table[] = {backward<DType::f32>, backward<DType::f64>, backward<DType::bf16>,
                                   backward<DType::f16>};
  table[static_cast<int>(io.data)](io, on);
}

}  // namespace cuda
}  // namespace nf
