// Channel mix (1x1 convolution) on the CPU: y = W x + b at every position, and dx, dW, db in one pass over x and dy.
//
// All positions of all samples are columns; a tile is up to 256 of them. A tile whose rows lie at unit stride in the
// arithmetic's type is used in place, any other (channels-last, small images, tables, bf16) is packed to [C, tile]
// first. Column chunks are cut by shape alone and summed in order, so results do not depend on the thread count.

#include "mix_pack.h"
#include "processor.h"

namespace nf {
namespace NF_ISA {
namespace {

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardJob {
  const MixForward& k;
  Plan plan;

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<ForwardJob*>(self);
    const MixForward& k = job.k;
    const auto* w = static_cast<const T*>(k.weight);
    const auto* bias = static_cast<const T*>(k.bias);
    const Packing<T> packing = packing_for<T>(k.data);
    Buffer<T> in(job.plan.in_place ? 0 : k.channels * kTile), out(job.plan.in_place ? 0 : k.channels * kTile);
    Buffer<T> panel(k.channels * group<T>());
    for (int64_t i = begin; i < end; ++i) {
      int64_t n0;
      int count;
      job.plan.tile(i, k.positions, &n0, &count);
      if (job.plan.in_place) {
        multiply_tile<T>(w, k.channels, bias, column<T>(k.x, n0, k.positions), k.x.c, column<T>(k.y, n0, k.positions),
                         k.y.c, count, panel.data);
      } else {
        packing.pack(k.x, k.channels, k.positions, n0, n0 + count, in.data);
        multiply_tile<T>(w, k.channels, bias, in.data, kTile, out.data, kTile, padded<T>(count), panel.data);
        packing.unpack(k.y, k.channels, k.positions, n0, n0 + count, out.data);
      }
    }
  }
};

template <typename T>
void forward(const MixForward& k, const Launch& on) {
  const View* views[] = {&k.x, &k.y};
  ForwardJob<T> job{k, Plan::make<T>(k.data, k.batch, k.positions, views, 2)};
  if (job.plan.tiles == 0) return;
  const int64_t work = job.plan.columns * k.channels * (k.channels + 8);
  on.parallel(job.plan.tiles, job.plan.grain(job.plan.tiles, work), &job, ForwardJob<T>::body);
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardJob {
  const MixBackward& k;
  Plan plan;
  const T* transposed;  // W^T
  const T* shift;       // -W^-1 bias or null, where the input is rebuilt
  T* dweight;           // [chunks, C, C]
  T* dbias;             // [chunks, C]

  void chunk(int64_t i, T* in, T* grad, T* out, T* made, MixSums<T>& sums, T* panel) const {
    const int64_t channels = k.channels;
    const Packing<T> packing = packing_for<T>(k.data);
    sums.clear();
    for (int64_t j = plan.tiles * i / plan.chunks; j < plan.tiles * (i + 1) / plan.chunks; ++j) {
      int64_t n0;
      int count;
      plan.tile(j, k.positions, &n0, &count);
      const T *x = in, *dy = grad;
      int64_t ldx = kTile, ldy = kTile, ldo = kTile, ldr = kTile;
      T *dx = out, *rebuilt = made;
      if (plan.in_place) {
        x = column<T>(k.x, n0, k.positions), ldx = k.x.c;
        dy = column<T>(k.dy, n0, k.positions), ldy = k.dy.c;
        if (k.dx.data) dx = column<T>(k.dx, n0, k.positions), ldo = k.dx.c;
        if (k.inverse) rebuilt = column<T>(k.rebuilt, n0, k.positions), ldr = k.rebuilt.c;
      } else {
        packing.pack(k.dy, channels, k.positions, n0, n0 + count, grad);
        if (dweight || k.inverse) packing.pack(k.x, channels, k.positions, n0, n0 + count, in);
      }
      const int whole = padded<T>(count);
      if (k.inverse) {
        multiply_tile<T>(static_cast<const T*>(k.inverse), channels, shift, x, ldx, rebuilt, ldr, whole, panel);
        if (!plan.in_place) {
          // What pads the last tile is the shift, not zero, and multiplies zeros of dy.
          packing.unpack(k.rebuilt, channels, k.positions, n0, n0 + count, made);
        }
        x = rebuilt, ldx = ldr;
      }
      if (k.dx.data) multiply_tile<T>(transposed, channels, nullptr, dy, ldy, dx, ldo, whole, panel);
      if (dweight) sums.add_products(dy, ldy, x, ldx, whole);
      if (dbias) sums.add_sums(dy, ldy, whole);
      if (k.dx.data && !plan.in_place) packing.unpack(k.dx, channels, k.positions, n0, n0 + count, out);
    }
    if (dweight) sums.write_products(dweight + i * channels * channels);
    if (dbias) sums.write_sums(dbias + i * channels);
  }

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<BackwardJob*>(self);
    const int64_t tile = job.plan.in_place ? 0 : job.k.channels * kTile;
    Buffer<T> in(tile), grad(tile), out(tile), made(job.k.inverse ? tile : 0), panel(job.k.channels * group<T>());
    MixSums<T> sums(job.k.channels);
    for (int64_t i = begin; i < end; ++i) job.chunk(i, in.data, grad.data, out.data, made.data, sums, panel.data);
  }
};

template <typename T>
void backward(const MixBackward& k, const Launch& on) {
  const View* views[4] = {&k.x, &k.dy};
  int n = 2;
  if (k.dx.data) views[n++] = &k.dx;
  if (k.inverse) views[n++] = &k.rebuilt;
  const int64_t channels = k.channels, square = channels * channels;
  BackwardJob<T> job{k, Plan::make<T>(k.data, k.batch, k.positions, views, n), nullptr, nullptr, nullptr, nullptr};
  const int64_t chunks = job.plan.chunks;
  Buffer<T> transposed(square), dweight(k.dweight ? chunks * square : 0), dbias(k.dbias ? chunks * channels : 0);
  transpose(static_cast<const T*>(k.weight), channels, transposed.data);
  job.transposed = transposed.data;
  Buffer<T> shift(k.inverse && k.bias ? channels : 0);
  if (k.inverse && k.bias) {
    const auto *inverse = static_cast<const T*>(k.inverse), *bias = static_cast<const T*>(k.bias);
    for (int64_t o = 0; o < channels; ++o)
      for (int64_t c = 0; c < channels; ++c) shift.data[o] -= inverse[o * channels + c] * bias[c];
    job.shift = shift.data;
  }
  job.dweight = k.dweight ? dweight.data : nullptr;
  job.dbias = k.dbias ? dbias.data : nullptr;
  const int64_t work = job.plan.columns * channels * (2 * channels + 8);
  if (chunks) on.parallel(chunks, job.plan.grain(chunks, work), &job, BackwardJob<T>::body);
  if (k.dweight) add_partials(dweight.data, chunks, square, static_cast<T*>(k.dweight));
  if (k.dbias) add_partials(dbias.data, chunks, channels, static_cast<T*>(k.dbias));
}

}  // namespace

void channel_mix_forward(const MixForward& k, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, on) : forward<float>(k, on);
}

void channel_mix_backward(const MixBackward& k, const Launch& on) {
  k.data == DType::f64 ? backward<double>(k, on) : backward<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
