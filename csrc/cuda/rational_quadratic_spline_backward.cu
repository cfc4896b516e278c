// The backward of rational-quadratic splines on CUDA, of both directions, from the spline's own x. Gradients of raw
// values take their places in shared memory and leave as they came.

#include "rational_quadratic_spline_launch.h"

namespace nf {
namespace cuda {
namespace {

template <typename T>
struct SplineBackwardArgs {
  SplineRules<T> rules;
  SplineTile tile;
  DType data;
  SplineParams params, dparams;
  View x, dy, dlogdet, dx, mask;
  uint32_t raw_at;  // bytes into shared memory
  bool passing_along;
};

template <DType R, int K, bool planes>
__global__ void __launch_bounds__(kSplineThreads, kSplineBlocks<R, K, planes, true>)
    spline_gradients(const SplineBackwardArgs<ArithmeticOf<R>> k) {
  using T = ArithmeticOf<R>;
  using S = StorageType<R>;
  NF_SHARED(unsigned char, shared);
  int* channel_of = reinterpret_cast<int*>(shared);
  S* raw = reinterpret_cast<S*>(shared + k.raw_at);
  const SplinePlace at(k.tile);
  const bool with_params = k.dparams.view.data != nullptr;
  const bool as_it_leaves = k.params.move == Move::values && with_params;
  const uint32_t shift = shift_of<S>(k.tile, at, as_it_leaves ? k.dparams : k.params);
  bring_tile<R, planes>(k.tile, at, k.params, raw, shift);
  if (k.tile.channel_map) {
    invert_map(k.tile, at, channel_of);
    if (k.dx.data)
      visit_passing(k.tile, at, channel_of, k.passing_along, [&](uint32_t s, int64_t c, uint32_t w) {
        const int64_t b = at.b0 + s, p = at.p0 + w;
        store_any(k.dx.data, k.data, b * k.dx.b + c * k.dx.c + p * k.dx.p,
                  k.dy.data ? load_any<T>(k.dy.data, k.data, b * k.dy.b + c * k.dy.c + p * k.dy.p) : T(0));
      });
  }
  const SplineElement<planes> e(k.tile, at, threadIdx.x);
  const int64_t b = at.b0 + e.s, p = at.p0 + e.w;
  int64_t c = at.j0 + e.j;
  if (e.exists && k.tile.channel_map) c = channel_of[e.j];
  const bool here = e.exists && c >= 0;
  T x = T(0), dy = T(0), dl = T(0);
  bool on = here;
  if (here) {  // under way while params arrive
    x = load_any<T>(k.x.data, k.data, b * k.x.b + c * k.x.c + p * k.x.p);
    if (k.dy.data) dy = load_any<T>(k.dy.data, k.data, b * k.dy.b + c * k.dy.c + p * k.dy.p);
    if (k.dlogdet.data) dl = static_cast<const T*>(k.dlogdet.data)[b * k.dlogdet.b + c * k.dlogdet.c + p * k.dlogdet.p];
    on = !k.mask.data || static_cast<const bool*>(k.mask.data)[b * k.mask.b + c * k.mask.c + p * k.mask.p];
  }
  copy_wait<0>();
  sync_block();
  const RawRow<R, planes> row{raw + shift + e.start(k.tile, threadIdx.x), static_cast<int>(k.tile.width)};
  T dx = dy;
  if (on)
    dx = element_gradients<K>(x, dy, dl, row, k.rules, with_params);
  else if (e.exists && with_params)
    clear_row(row, 0, static_cast<int>(k.tile.count));
  if (here && k.dx.data) store_any(k.dx.data, k.data, b * k.dx.b + c * k.dx.c + p * k.dx.p, dx);
  if (!with_params) return;
  sync_block();
  send_tile<R, planes>(k.tile, at, k.dparams, raw, shift);
}

template <DType R, int K, bool planes>
void launch_backward(const SplineForm& form, const SplineBackward& io, const SplinePlan& plan, const Launch& on) {
  using T = ArithmeticOf<R>;
  SplineBackwardArgs<T> a{SplineRules<T>(form), plan.tile};
  a.data = form.data;
  a.params = moved_params(form, plan, io.params, R);
  if (io.dparams.data) a.dparams = moved_params(form, plan, io.dparams, R);
  a.x = io.x;
  a.dy = io.dy;
  a.dlogdet = io.dlogdet;
  a.dx = io.dx;
  a.mask = form.mask;
  a.raw_at = static_cast<uint32_t>(plan.shared_map);
  a.passing_along = io.x.p <= io.x.c && form.positions > 1;
  launch(spline_gradients<R, K, planes>, on, plan.blocks, plan.threads, plan.shared_map + plan.shared_raw, a);
}

}  // namespace

void rational_quadratic_spline_backward(const SplineForm& given, const SplineBackward& tensors, const Launch& on) {
  SplineForm k = given;
  SplineBackward io = tensors;
  for (View* v : {&io.x, &io.dy, &io.dlogdet, &io.dx}) *v = normal(*v, k.batch, k.channels, k.positions);
  for (View* v : {&io.params, &io.dparams}) *v = normal(*v, k.batch, k.transformed * k.count(), k.positions);
  if (k.batch * k.channels * k.positions == 0) return;
  with_kernel(k, io.params, [&](auto kind, const SplinePlan& plan) {
    using Kind = decltype(kind);
    launch_backward<Kind::raw, Kind::bins, Kind::planes>(k, io, plan, on);
  });
}

}  // namespace cuda
}  // namespace nf
