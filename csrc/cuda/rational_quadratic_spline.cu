// Rational-quadratic splines on CUDA: forward and inverse, with the log-derivative of each element or its sum over each
// sample. Tiles and the order of every sum depend on shapes and strides alone.

#include "rational_quadratic_spline_launch.h"

namespace nf {
namespace cuda {
namespace {

template <typename T>
struct SplineForwardArgs {
  SplineRules<T> rules;
  SplineTile tile;
  DType data;
  SplineParams params;
  View x, y, mask, each;
  uint32_t sums_at, raw_at;  // bytes into shared memory
  bool passing_along;
  T* out;  // of each sample, or of each tile of it
  const T* running;
  int64_t running_stride;
};

template <DType R, int K, bool planes>
__global__ void __launch_bounds__(kSplineThreads, kSplineBlocks<R, K, planes, false>)
    spline_elements(const SplineForwardArgs<ArithmeticOf<R>> k) {
  using T = ArithmeticOf<R>;
  using S = StorageType<R>;
  NF_SHARED(unsigned char, shared);
  int* channel_of = reinterpret_cast<int*>(shared);
  T* sums = reinterpret_cast<T*>(shared + k.sums_at);
  S* raw = reinterpret_cast<S*>(shared + k.raw_at);
  const SplinePlace at(k.tile);
  const uint32_t shift = shift_of<S>(k.tile, at, k.params);
  bring_tile<R, planes>(k.tile, at, k.params, raw, shift);
  if (k.tile.channel_map) {
    invert_map(k.tile, at, channel_of);
    visit_passing(k.tile, at, channel_of, k.passing_along, [&](uint32_t s, int64_t c, uint32_t w) {
      const int64_t b = at.b0 + s, p = at.p0 + w;
      store_any(k.y.data, k.data, b * k.y.b + c * k.y.c + p * k.y.p,
                load_any<T>(k.x.data, k.data, b * k.x.b + c * k.x.c + p * k.x.p));
      if (k.each.data) static_cast<T*>(k.each.data)[b * k.each.b + c * k.each.c + p * k.each.p] = T(0);
    });
  }
  const SplineElement<planes> e(k.tile, at, threadIdx.x);
  const int64_t b = at.b0 + e.s, p = at.p0 + e.w;
  int64_t c = at.j0 + e.j;
  if (e.exists && k.tile.channel_map) c = channel_of[e.j];
  const bool here = e.exists && c >= 0;
  SplineValue<T> v{T(0), T(0)};
  bool on = here;
  if (here) {  // under way while params arrive
    v.value = load_any<T>(k.x.data, k.data, b * k.x.b + c * k.x.c + p * k.x.p);
    on = !k.mask.data || static_cast<const bool*>(k.mask.data)[b * k.mask.b + c * k.mask.c + p * k.mask.p];
  }
  copy_wait<0>();
  sync_block();
  if (on) {
    const RawRow<R, planes> row{raw + shift + e.start(k.tile, threadIdx.x), static_cast<int>(k.tile.width)};
    v = transform_element<K>(v.value, row, k.rules);
  }
  if (here) {
    store_any(k.y.data, k.data, b * k.y.b + c * k.y.c + p * k.y.p, v.value);
    if (k.each.data) static_cast<T*>(k.each.data)[b * k.each.b + c * k.each.c + p * k.each.p] = v.log;
  }
  if (k.each.data) return;
  sums[threadIdx.x] = v.log;
  sync_block();
  const uint32_t team = 1u << k.tile.log_team, member = threadIdx.x & (team - 1), s = threadIdx.x >> k.tile.log_team;
  const uint32_t per_sample = k.tile.width * k.tile.channels;
  T sum = T(0);
  if (s < at.samples)
    for (uint32_t i = member; i < per_sample; i += team) sum += sums[s * per_sample + i];
  sum = team_sum(sum, k.tile.log_team);
  if (member == 0 && s < at.samples) {
    const int64_t unit = k.tile.pieces == 1 ? at.b0 + s : blockIdx.x;
    k.out[unit] = k.running ? sum + k.running[unit * k.running_stride] : sum;
  }
}

template <DType R, int K, bool planes>
void launch_forward(const SplineForm& form, const SplineForward& io, const SplinePlan& plan, const Launch& on) {
  using T = ArithmeticOf<R>;
  SplineForwardArgs<T> a{SplineRules<T>(form), plan.tile};
  a.data = form.data;
  a.params = moved_params(form, plan, io.params, R);
  a.x = io.x;
  a.y = io.y;
  a.mask = form.mask;
  a.each = io.each;
  a.sums_at = static_cast<uint32_t>(plan.shared_map);
  a.raw_at = static_cast<uint32_t>(plan.shared_map + plan.shared_sums);
  a.passing_along = io.x.p <= io.x.c && form.positions > 1;
  const bool whole = plan.tile.pieces == 1;
  const int64_t units = form.batch * plan.tile.pieces;
  T* out = static_cast<T*>(io.logdet);
  const T* running = static_cast<const T*>(io.logdet_in);
  a.out = whole || io.each.data ? out : static_cast<T*>(on.scratch(units * sizeof(T)));
  a.running = whole ? running : nullptr;
  a.running_stride = io.logdet_in_stride;
  launch(spline_elements<R, K, planes>, on, plan.blocks, plan.threads, plan.shared(), a);
  if (!whole && !io.each.data)
    launch(sum_logdets<T>, on, divide_up(form.batch, kThreads / 32), kThreads, 0, a.out,
           static_cast<int>(plan.tile.pieces), running, io.logdet_in_stride, form.batch, out);
}

template <typename T>
void no_elements(const SplineForm& k, const SplineForward& io, const Launch& on) {
  if (k.batch && io.logdet)
    launch(sum_logdets<T>, on, divide_up(k.batch, kThreads / 32), kThreads, 0, nullptr, 0,
           static_cast<const T*>(io.logdet_in), io.logdet_in_stride, k.batch, static_cast<T*>(io.logdet));
}

}  // namespace

void rational_quadratic_spline_forward(const SplineForm& given, const SplineForward& tensors, const Launch& on) {
  SplineForm k = given;
  SplineForward io = tensors;
  for (View* v : {&io.x, &io.y, &io.each}) *v = normal(*v, k.batch, k.channels, k.positions);
  io.params = normal(io.params, k.batch, k.transformed * k.count(), k.positions);
  if (k.batch * k.channels * k.positions == 0)
    return k.data == DType::f64 ? no_elements<double>(k, io, on) : no_elements<float>(k, io, on);
  with_kernel(k, io.params, [&](auto kind, const SplinePlan& plan) {
    using Kind = decltype(kind);
    launch_forward<Kind::raw, Kind::bins, Kind::planes>(k, io, plan, on);
  });
}

}  // namespace cuda
}  // namespace nf
