// A coupling and the channel mix that follows it on the CPU: the coupling's output never leaves the cache, forward; and
// backward from the mix's output, z -> y = W^-1 (z - b) -> the coupling's gradient, in one pass.
//
// All positions of all samples are columns; a tile is up to 256 of them, a row of it one channel's. A row that lies at
// unit stride in the arithmetic's type is used in place, any other is packed. Tiles and chunks of tiles are cut by
// shape alone and their sums added in order, so results do not depend on the thread count.

#include "affine_coupling_block.h"
#include "mix_pack.h"
#include "processor.h"

namespace nf {
namespace NF_ISA {
namespace {

// What both directions share: how columns are cut, and what the coupling computes.
template <typename T>
struct Common {
  const Coupling& k;
  MapConstants<T> constants;
  T shift_factor;
  int64_t batch, positions;  // as packing sees them: a table's samples are the positions of one
  Plan plan;

  // Columns come in whole groups of the product and in whole lanes of the coupling.
  static constexpr int kStep = group<T>() > kLane ? group<T>() : kLane;
  static int whole(int count) { return (count + kStep - 1) / kStep * kStep; }

  explicit Common(const Coupling& coupling)
      : k(coupling),
        constants(map_constants<T>(k.constants)),
        shift_factor(T(k.shift_factor())),
        batch(k.positions == 1 ? 1 : k.batch),
        positions(k.positions == 1 ? k.batch : k.positions),
        plan(Plan::make<T>(k.data, batch, positions, nullptr, 0, kStep)) {}

  View seen(View v) const {
    if (k.positions == 1) v.p = v.b, v.b = 0;
    return v;
  }
  // The half of params that holds shifts (or raw scales), a channel per transformed channel.
  View half(View v, int64_t offset) const {
    v = seen(v);
    if (v.data) v.data = static_cast<char*>(v.data) + offset * size_of(k.raw);
    v.c *= k.params_step();
    return v;
  }

  // f(sample, first column in the tile, length) for the samples that columns [n0, n0 + count) belong to.
  template <typename F>
  void samples(int64_t n0, int count, F&& f) const {
    stretches(n0, n0 + count, k.positions,
              [&](int64_t b, int64_t, int64_t at, int64_t length) { f(b, static_cast<int>(at), length); });
  }
  int64_t tile_of(int64_t n) const {
    return plan.in_place ? n / positions * plan.per_sample + n % positions / kTile : n / kTile;
  }

  void set_gain(int64_t row, int n, Scratch<T>& s) const {
    const T gain = static_cast<const T*>(k.gain)[row];
    fill(s.g, n, gain);
    fill(s.log_g, n, static_cast<T>(std::log(static_cast<double>(gain))));
  }
};

// A tensor as tiles see it: in place where it lies as the arithmetic wants it, through `tile` otherwise.
template <typename T>
struct Rows {
  View view;
  int64_t channels, positions, ld;
  bool direct;
  Packing<T> packing;
  T* tile;

  Rows(const Common<T>& job, const View& v, DType type, int64_t count, T* scratch)
      : view(v),
        channels(count),
        positions(job.positions),
        ld(kTile),
        direct(job.plan.in_place && type == native<T>() && v.p == 1),
        packing(packing_for<T>(type)),
        tile(scratch) {
    if (direct) ld = v.c;
  }

  T* in_place(int64_t n0) const { return column<T>(view, n0, positions); }
  const T* read(int64_t n0, int count) const {
    if (direct) return in_place(n0);
    packing.pack(view, channels, positions, n0, n0 + count, tile);
    return tile;
  }
  T* target(int64_t n0) const { return direct ? in_place(n0) : tile; }
  void finish(int64_t n0, int count) const {
    if (!direct) packing.unpack(view, channels, positions, n0, n0 + count, tile);
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardJob : Common<T> {
  const CouplingMixForward& io;
  BlockFunction<T> compute;
  double* partial = nullptr;  // [tiles + samples]: of sample b in tile i at i + b, no two of which are the same

  ForwardJob(const Coupling& coupling, const CouplingMixForward& tensors)
      : Common<T>(coupling), io(tensors), compute(block_function<T, false>(coupling)) {}

  void run(int64_t begin, int64_t end) const {
    const Coupling& k = this->k;
    const int64_t channels = k.channels, passing = channels - k.transformed, first = k.first == 0 ? k.transformed : 0;
    Buffer<T> memory((3 * channels + 2 * k.transformed) * kTile), panel(channels * group<T>());
    T *xs = memory.data, *ys = xs + channels * kTile, *zs = ys + channels * kTile, *ts = zs + channels * kTile;
    const View halves[] = {this->half(io.params, k.shift_offset(io.params.c)),
                           this->half(io.params, k.scale_offset(io.params.c))};
    const Rows<T> x(*this, this->seen(io.x), k.data, channels, xs), t(*this, halves[0], k.raw, k.transformed, ts);
    const Rows<T> r(*this, halves[1], k.raw, k.transformed, ts + k.transformed * kTile);
    Rows<T> z(*this, this->seen(io.z), k.data, channels, zs);
    if (io.extra.view.data) z.direct = false, z.ld = kTile;  // written from the tile twice
    const Packing<T> extra = packing_for<T>(io.extra.type);
    const View extra_view = this->seen(io.extra.view);
    Scratch<T> s;
    s.quiet();
    fill(s.g, kBlock, T(1)), fill(s.log_g, kBlock, T(0)), fill(s.r, kBlock, T(0));
    for (int64_t i = begin; i < end; ++i) {
      int64_t n0;
      int count;
      this->plan.tile(i, this->positions, &n0, &count);
      const int whole = this->whole(count);
      const T *xt = x.read(n0, count), *tt = t.read(n0, count), *rt = k.has_scale() ? r.read(n0, count) : nullptr;
      for (int64_t c = first; c < first + passing; ++c) std::memcpy(ys + c * kTile, xt + c * x.ld, whole * sizeof(T));
      double sums[kTile] = {};  // of log s, per column
      for (int64_t j = 0; j < k.transformed; ++j) {
        if (k.gain) this->set_gain(j, whole, s);
        Block<T> block = s.block();
        block.x = xt + (k.first + j) * x.ld;
        block.t = tt + j * t.ld;
        if (rt) block.r = rt + j * r.ld;
        block.y = ys + (k.first + j) * kTile;
        compute(block, whole, this->constants, this->shift_factor);
        for (int n = 0; n < whole; ++n) sums[n] += s.log_s[n];
      }
      this->samples(n0, count, [&](int64_t b, int at, int64_t length) {
        double lanes[kLane] = {};
        for (int64_t n = 0; n < length; ++n) lanes[n % kLane] += sums[at + n];
        partial[i + b] = sum_lanes(lanes);
      });
      T* zt = z.target(n0);
      multiply_tile<T>(static_cast<const T*>(io.weight), channels, static_cast<const T*>(io.bias), ys, kTile, zt, z.ld,
                       whole, panel.data);
      z.finish(n0, count);
      if (!extra_view.data) continue;
      if (k.data != native<T>()) z.read(n0, count);  // what z says, in z's precision
      extra.unpack(extra_view, io.extra.count, this->positions, n0, n0 + count, zt + io.extra.start * kTile);
    }
  }

  static void body(void* self, int64_t begin, int64_t end) { static_cast<ForwardJob*>(self)->run(begin, end); }
};

template <typename T>
void forward(const Coupling& k, const CouplingMixForward& io, const Launch& on) {
  ForwardJob<T> job(k, io);
  const int64_t tiles = job.plan.tiles;
  Buffer<double> partial(tiles + k.batch);
  job.partial = partial.data;
  const int64_t work = job.plan.columns * k.channels * (k.channels + 24);
  if (tiles) on.parallel(tiles, job.plan.grain(tiles, work), &job, ForwardJob<T>::body);
  const T* in = static_cast<const T*>(io.logdet_in);
  for (int64_t b = 0; b < k.batch; ++b) {
    double total = in ? in[b * io.logdet_in_stride] : T(0);
    if (k.positions)
      for (int64_t i = job.tile_of(b * k.positions); i <= job.tile_of((b + 1) * k.positions - 1); ++i)
        total += partial.data[i + b];
    static_cast<T*>(io.logdet)[b] = static_cast<T>(total);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// The coupling that undoes k.
inline Coupling undo(Coupling k) {
  k.shift_first = !k.shift_first;
  k.negate_shift = !k.negate_shift;
  k.negate_log = !k.negate_log;
  return k;
}

template <typename T>
struct BackwardJob : Common<T> {
  const CouplingMixBackward& io;
  BlockFunction<T> compute, rebuild;
  const T* transposed;  // W^T
  T *dweight, *dbias;   // [chunks, C, C] and [chunks, C], or null
  double* dgain;        // [chunks, transformed] or null

  BackwardJob(const Coupling& coupling, const CouplingMixBackward& tensors)
      : Common<T>(coupling),
        io(tensors),
        compute(block_function<T, true>(coupling)),
        rebuild(block_function<T, false>(undo(coupling))) {}

  T dlogdet(int64_t b) const { return io.dlogdet ? static_cast<const T*>(io.dlogdet)[b * io.dlogdet_stride] : T(0); }

  void run(int64_t begin, int64_t end) const {
    const Coupling& k = this->k;
    const int64_t channels = k.channels, count_t = k.transformed, tile = channels * kTile;
    Buffer<T> memory(6 * tile + 4 * count_t * kTile), panel(channels * group<T>());
    T *zs = memory.data, *ys = zs + tile, *grads = ys + tile, *dys = grads + tile, *outs = dys + tile,
      *rebuilt = outs + tile;
    T *ts = rebuilt + tile, *rs = ts + count_t * kTile, *dts = rs + count_t * kTile, *drs = dts + count_t * kTile;
    const auto half = [&](const View& v, bool scale, T* scratch) {
      const View part = this->half(v, scale ? k.scale_offset(v.c) : k.shift_offset(v.c));
      return Rows<T>(*this, part, k.raw, count_t, scratch);
    };
    const auto data = [&](const View& v, T* scratch) {
      return Rows<T>(*this, this->seen(v), k.data, channels, scratch);
    };
    const Rows<T> z = data(io.z, zs), dz = data(io.dz, grads), dx = data(io.dx, outs), x = data(io.x, rebuilt);
    const Rows<T> t = half(io.params, false, ts), r = half(io.params, true, rs);
    const Rows<T> dt = half(io.dparams, false, dts), dr = half(io.dparams, true, drs);
    const Packing<T> extra = packing_for<T>(io.dextra.type);
    const View extra_view = this->seen(io.dextra.view);
    const int64_t passing = channels - count_t, first = k.first == 0 ? count_t : 0;
    MixSums<T> sums(channels);
    Scratch<T> s;
    s.quiet();
    fill(s.g, kBlock, T(1)), fill(s.log_g, kBlock, T(0)), fill(s.r, kBlock, T(0));

    for (int64_t chunk = begin; chunk < end; ++chunk) {
      sums.clear();
      double* gains = dgain ? dgain + chunk * count_t : nullptr;
      const int64_t i1 = this->plan.tiles * (chunk + 1) / this->plan.chunks;
      for (int64_t i = this->plan.tiles * chunk / this->plan.chunks; i < i1; ++i) {
        int64_t n0;
        int count;
        this->plan.tile(i, this->positions, &n0, &count);
        const int whole = this->whole(count);

        // y = W^-1 (z - bias)
        const T* zt = z.read(n0, count);
        int64_t ldz = z.ld;
        if (io.bias) {
          for (int64_t c = 0; c < channels; ++c) {
            const T bias = static_cast<const T*>(io.bias)[c];
            for (int n = 0; n < whole; ++n) zs[c * kTile + n] = zt[c * ldz + n] - bias;
          }
          zt = zs, ldz = kTile;
        }
        multiply_tile<T>(static_cast<const T*>(io.inverse), channels, nullptr, zt, ldz, ys, kTile, whole, panel.data);

        // dZ, its sums, and dy = W^T dZ
        const T* grad = grads;
        int64_t ldg = kTile;
        if (io.dz.data)
          grad = dz.read(n0, count), ldg = dz.ld;
        else
          std::memset(grads, 0, tile * sizeof(T));
        if (extra_view.data) {
          extra.pack(extra_view, io.dextra.count, this->positions, n0, n0 + count, outs);
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t e = c - io.dextra.start;
            const bool has = e >= 0 && e < io.dextra.count;
            if (!has && grad == grads) continue;
            const T* from = grad + c * ldg;
            for (int n = 0; n < whole; ++n) grads[c * kTile + n] = has ? from[n] + outs[e * kTile + n] : from[n];
          }
          grad = grads, ldg = kTile;
        }
        if (dweight) sums.add_products(grad, ldg, ys, kTile, whole);
        if (dbias) sums.add_sums(grad, ldg, whole);
        multiply_tile<T>(transposed, channels, nullptr, grad, ldg, dys, kTile, whole, panel.data);

        // The coupling's gradient, from its output.
        this->samples(n0, count, [&](int64_t b, int at, int64_t length) {
          fill(s.dlogdet + at, static_cast<int>(length), dlogdet(b));
        });
        fill(s.dlogdet + count, whole - count, T(0));
        const T *tt = t.read(n0, count), *rt = k.has_scale() ? r.read(n0, count) : nullptr;
        T *dxt = dx.target(n0), *dtt = dt.target(n0), *drt = k.has_scale() ? dr.target(n0) : nullptr;
        T* xt = io.x.data ? x.target(n0) : nullptr;
        for (int64_t c = first; c < first + passing; ++c) {
          std::memcpy(dxt + c * dx.ld, dys + c * kTile, whole * sizeof(T));
          if (xt) std::memcpy(xt + c * x.ld, ys + c * kTile, whole * sizeof(T));
        }
        for (int64_t j = 0; j < count_t; ++j) {
          const int64_t c = k.first + j;
          if (k.gain) this->set_gain(j, whole, s);
          Block<T> block = s.block();
          block.x = ys + c * kTile;
          block.dy = dys + c * kTile;
          block.t = tt + j * t.ld;
          block.dx = dxt + c * dx.ld;
          block.dt = dtt + j * dt.ld;
          if (rt) block.r = rt + j * r.ld, block.dr = drt + j * dr.ld;
          compute(block, whole, this->constants, this->shift_factor);
          if (gains) {
            T lanes[kLane] = {};
            fill(s.dg + count, whole - count, T(0));
            add_lanes(s.dg, whole, lanes);
            gains[j] += sum_lanes(lanes);
          }
          if (xt) {
            block.y = xt + c * x.ld;
            rebuild(block, whole, this->constants, -this->shift_factor);
          }
        }
        dx.finish(n0, count);
        dt.finish(n0, count);
        if (k.has_scale()) dr.finish(n0, count);
        if (xt) x.finish(n0, count);
      }
      if (dweight) sums.write_products(dweight + chunk * channels * channels);
      if (dbias) sums.write_sums(dbias + chunk * channels);
    }
  }

  static void body(void* self, int64_t begin, int64_t end) { static_cast<BackwardJob*>(self)->run(begin, end); }
};

template <typename T>
void backward(const Coupling& k, const CouplingMixBackward& io, const Launch& on) {
  BackwardJob<T> job(k, io);
  const int64_t chunks = job.plan.chunks, channels = k.channels, square = channels * channels;
  Buffer<T> transposed(square), dweight(io.dweight ? chunks * square : 0), dbias(io.dbias ? chunks * channels : 0);
  Buffer<double> dgain(io.dgain ? chunks * k.transformed : 0);
  transpose(static_cast<const T*>(io.weight), channels, transposed.data);
  job.transposed = transposed.data;
  job.dweight = io.dweight ? dweight.data : nullptr;
  job.dbias = io.dbias ? dbias.data : nullptr;
  job.dgain = io.dgain ? dgain.data : nullptr;
  const int64_t work = job.plan.columns * channels * (3 * channels + 32);
  if (chunks) on.parallel(chunks, job.plan.grain(chunks, work), &job, BackwardJob<T>::body);
  if (io.dweight) add_partials(dweight.data, chunks, square, static_cast<T*>(io.dweight));
  if (io.dbias) add_partials(dbias.data, chunks, channels, static_cast<T*>(io.dbias));
  if (io.dgain) add_partials(dgain.data, chunks, k.transformed, static_cast<T*>(io.dgain));
}

}  // namespace

void coupling_mix_forward(const Coupling& k, const CouplingMixForward& io, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, io, on) : forward<float>(k, io, on);
}

void coupling_mix_backward(const Coupling& k, const CouplingMixBackward& io, const Launch& on) {
  k.data == DType::f64 ? backward<double>(k, io, on) : backward<float>(k, io, on);
}

}  // namespace NF_ISA
}  // namespace nf
