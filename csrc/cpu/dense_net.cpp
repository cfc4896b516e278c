// Fully connected conditioners on the CPU: all layers of a few rows while they are in the first cache, where a library
// makes each layer a pass over all rows, a task for its threads and a call of its own.
//
// The matrices are packed once to a call. Rows do not meet in the forward; the gradient's sums over rows are cut into
// chunks by shape alone and added up in order, so that results do not depend on the thread count.

#include "dense_net_rows.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kTileRows = 8 * kRows;
constexpr int64_t kChunkRows = 96;  // of the backward, at least: what a chunk's sums cost is then a few percent
constexpr int64_t kMostChunks = 16;
constexpr int64_t kMostLayers = 66;

// The matrices, biases and offsets of one net.
template <typename T>
struct Shape {
  const DenseNet& net;
  int64_t count, ld;  // of layers; of a row of hidden values
  explicit Shape(const DenseNet& n) : net(n), count(n.layers + 2), ld(padded_hidden(n.hidden, sizeof(T))) {}

  int64_t depth(int64_t l) const { return l == 0 ? net.in : net.hidden; }
  int64_t width(int64_t l) const { return l + 1 == count ? net.out : net.hidden; }
  const T* weight(int64_t l) const { return static_cast<const T*>(net.weights[l]); }
  const T* bias(int64_t l) const { return static_cast<const T*>(net.biases[l]); }
  int64_t multiplications() const { return net.hidden * (net.in + net.out + net.layers * net.hidden); }
  const T* shares(int64_t row, int64_t which) const {
    return net.shares ? static_cast<const T*>(net.shares) + (row * net.share_count + which) * net.hidden : nullptr;
  }
  int64_t share_step() const { return net.share_count * net.hidden; }

  // x's rows, side by side with zeros up to whole vectors.
  void pack_rows(int64_t row, int64_t count_, T* to, int64_t ldto) const {
    const T* from = static_cast<const T*>(net.x) + row * net.x_row;
    for (int64_t n = 0; n < count_; ++n)
      for (int64_t k = 0; k < net.in; ++k) to[n * ldto + k] = from[n * net.x_row + k * net.x_column];
  }
};

template <typename T>
void add_share(const T* share, int64_t step, int64_t width, int64_t count, T* h, int64_t ld) {
  for (int64_t n = 0; n < count; ++n) {
    NF_INDEPENDENT
    for (int64_t c = 0; c < width; ++c) h[n * ld + c] += share[n * step + c];
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct Packed {
  Buffer<T> data;
  int64_t at[kMostLayers], bias_at[kMostLayers];

  explicit Packed(const Shape<T>& s) : data(size(s)) {
    int64_t end = 0;
    for (int64_t l = 0; l < s.count; ++l) {
      const int64_t ld = whole_vectors<T>(s.width(l));
      at[l] = end;
      bias_at[l] = end + s.depth(l) * ld;
      end = bias_at[l] + ld;
      pack_transposed(s.weight(l), s.width(l), s.depth(l), data.data + at[l]);
      std::memcpy(data.data + bias_at[l], s.bias(l), s.width(l) * sizeof(T));
    }
  }
  static int64_t size(const Shape<T>& s) {
    int64_t n = 0;
    for (int64_t l = 0; l < s.count; ++l) n += (s.depth(l) + 1) * whole_vectors<T>(s.width(l));
    return n;
  }
};

template <typename T>
struct NetForward {
  const DenseNetForward& k;
  const Shape<T>& s;
  const Packed<T>& packed;

  // Layer l of `count` rows.
  void layer(int64_t l, const T* x, int64_t ldx, const T* base, int64_t count, T* y, int64_t ldy) const {
    dense(x, ldx, packed.data.data + packed.at[l], s.depth(l), s.width(l), packed.data.data + packed.bias_at[l], base,
          s.ld, count, y, ldy);
  }

  void tile(int64_t row, int64_t count, T* x, T* spare) const {
    const DenseNet& net = s.net;
    const Activated<T> act = activated<T>(net.activation);
    const int64_t ld = s.ld, n = count * ld, ldx = whole_vectors<T>(net.in), area = kTileRows * ld;
    T *const a = spare, *h = spare + area, *const inner = spare + 2 * area;
    const auto slot = [&](int64_t i, T* otherwise) {
      return k.saved ? static_cast<T*>(k.saved) + (i * net.batch + row) * ld : otherwise;
    };
    s.pack_rows(row, count, x, ldx);
    h = slot(0, h);
    layer(0, x, ldx, nullptr, count, h, ld);
    if (net.share == Share::add) add_share(s.shares(row, 0), s.share_step(), net.hidden, count, h, ld);
    for (int64_t l = 1; l <= net.layers; ++l) {
      act.value(h, a, n);
      if (!net.residual) {
        h = slot(l, h);
        layer(l, a, ld, nullptr, count, h, ld);
        continue;
      }
      T* const t = slot(l, inner);
      layer(l, a, ld, nullptr, count, t, ld);
      act.value(t, a, n);
      const int64_t block = l / 2;
      T* const next = slot(++l, h);
      if (net.share == Share::gate) {
        T* const ungated = slot(1 + net.layers + block, inner);
        layer(l, a, ld, nullptr, count, ungated, ld);
        const T* gate = s.shares(row, block);
        for (int64_t i = 0; i < count; ++i) {
          NF_INDEPENDENT
          for (int64_t c = 0; c < net.hidden; ++c)
            next[i * ld + c] = h[i * ld + c] + ungated[i * ld + c] * sigmoid_(gate[i * s.share_step() + c]);
        }
      } else {
        layer(l, a, ld, h, count, next, ld);
        if (net.share == Share::add) add_share(s.shares(row, block + 1), s.share_step(), net.hidden, count, next, ld);
      }
      h = next;
    }
    if (!net.residual) {
      act.value(h, a, n);
      h = a;
    }
    layer(s.count - 1, h, ld, nullptr, count, static_cast<T*>(k.y) + row * net.out, net.out);
  }

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<NetForward*>(self);
    const int64_t last = end * kRows < job.s.net.batch ? end * kRows : job.s.net.batch;
    Buffer<T> x(kTileRows * whole_vectors<T>(job.s.net.in)), spare(3 * kTileRows * job.s.ld);
    for (int64_t row = begin * kRows; row < last; row += kTileRows)
      job.tile(row, last - row < kTileRows ? last - row : kTileRows, x.data, spare.data);
  }
};

// Rows, in units of `rows` of them, that are worth a thread.
template <typename T>
int64_t grain_of(const Shape<T>& s, int64_t rows, int64_t factor) {
  return kWork / (factor * rows * s.multiplications() + 1) + 1;
}

template <typename T>
void forward(const DenseNetForward& k, const Launch& on) {
  if (k.net.batch == 0) return;
  const Shape<T> s(k.net);
  const Packed<T> packed(s);
  NetForward<T> job{k, s, packed};
  on.parallel((k.net.batch + kRows - 1) / kRows, grain_of(s, kRows, 1), &job, NetForward<T>::body);
}

// --- backward --------------------------------------------------------------------------------------------------------

// Each layer's matrix with its rows in whole vectors: itself where they are.
template <typename T>
struct Padded {
  Buffer<T> data;
  const T* weights[kMostLayers];

  explicit Padded(const Shape<T>& s) : data(size(s)) {
    int64_t end = 0;
    for (int64_t l = 0; l < s.count; ++l) {
      const int64_t depth = s.depth(l), ld = whole_vectors<T>(depth);
      weights[l] = s.weight(l);
      if (ld == depth) continue;
      weights[l] = data.data + end;
      for (int64_t i = 0; i < s.width(l); ++i)
        std::memcpy(data.data + end + i * ld, s.weight(l) + i * depth, depth * sizeof(T));
      end += s.width(l) * ld;
    }
  }
  static int64_t size(const Shape<T>& s) {
    int64_t n = 0;
    for (int64_t l = 0; l < s.count; ++l)
      if (s.depth(l) % Simd<T>::lanes) n += s.width(l) * whole_vectors<T>(s.depth(l));
    return n;
  }
};

template <typename T>
struct NetBackward {
  const DenseNetBackward& k;
  const Shape<T>& s;
  const Padded<T>& padded;
  int64_t chunks, total;
  int64_t at[kMostLayers], bias_at[kMostLayers];  // of a chunk's sums
  T* sums;                                        // [chunks, total], or null

  const T* slot(int64_t i, int64_t row) const {
    return static_cast<const T*>(k.saved) + (i * s.net.batch + row) * s.ld;
  }
  void gradient(int64_t l, const T* up, int64_t ldup, const T* x, int64_t ldx, int64_t count, T* to) const {
    if (to) add_outer(up, ldup, s.width(l), x, ldx, s.depth(l), count, to + at[l], to + bias_at[l]);
  }
  // The gradient of what layer l was given.
  void turned(int64_t l, const T* up, int64_t ldup, int64_t count, T* to) const {
    dense(up, ldup, padded.weights[l], s.width(l), s.depth(l), static_cast<const T*>(nullptr),
          static_cast<const T*>(nullptr), 0, count, to, l == 0 ? s.net.in : s.ld);
  }

  void tile(int64_t row, int64_t count, T* x, T* spare, T* to) const {
    const DenseNet& net = s.net;
    const Activated<T> act = activated<T>(net.activation);
    const int64_t ld = s.ld, n = count * ld, ldx = whole_vectors<T>(net.in), area = kTileRows * ld, last = s.count - 1;
    T *const a = spare, *const dh = spare + area, *const dt = spare + 2 * area, *const du = spare + 3 * area;
    const T* dy = static_cast<const T*>(k.dy) + row * net.out;
    const T* h = slot(net.layers, row);
    if (!net.residual) {
      act.value(h, a, n);
      gradient(last, dy, net.out, a, ld, count, to);
      turned(last, dy, net.out, count, dh);
      act.slope_times(h, dh, dh, n);
      for (int64_t l = net.layers; l > 0; --l) {
        h = slot(l - 1, row);
        act.value(h, a, n);
        gradient(l, dh, ld, a, ld, count, to);
        turned(l, dh, ld, count, dt);
        act.slope_times(h, dt, dh, n);
      }
    } else {
      gradient(last, dy, net.out, h, ld, count, to);
      turned(last, dy, net.out, count, dh);
      for (int64_t l = net.layers; l > 0; l -= 2) {
        const int64_t block = l / 2 - 1;
        const T *up = dh, *t = slot(l - 1, row);
        h = slot(l - 2, row);
        if (net.share == Share::gate) {
          gated(row, count, block, dh, du);
          up = du;
        } else if (net.share == Share::add) {
          share_gradient(row, count, block + 1, dh);
        }
        act.value(t, a, n);
        gradient(l, up, ld, a, ld, count, to);
        turned(l, up, ld, count, dt);
        act.slope_times(t, dt, dt, n);
        act.value(h, a, n);
        gradient(l - 1, dt, ld, a, ld, count, to);
        turned(l - 1, dt, ld, count, du);
        act.add_slope_times(h, du, dh, n);
      }
    }
    if (net.share == Share::add) share_gradient(row, count, 0, dh);
    if (to) {
      s.pack_rows(row, count, x, ldx);
      gradient(0, dh, ld, x, ldx, count, to);
    }
    if (k.dx) turned(0, dh, ld, count, static_cast<T*>(k.dx) + row * net.in);
  }

  T* dshare(int64_t row, int64_t which) const {
    return k.dshares ? static_cast<T*>(k.dshares) + (row * s.net.share_count + which) * s.net.hidden : nullptr;
  }
  void share_gradient(int64_t row, int64_t count, int64_t which, const T* dh) const {
    T* to = dshare(row, which);
    for (int64_t i = 0; to && i < count; ++i)
      std::memcpy(to + i * s.share_step(), dh + i * s.ld, s.net.hidden * sizeof(T));
  }
  // du = dh sigmoid(gate), and the gate's own gradient.
  void gated(int64_t row, int64_t count, int64_t block, const T* dh, T* du) const {
    const T *gate = s.shares(row, block), *ungated = slot(1 + s.net.layers + block, row);
    T* to = dshare(row, block);
    for (int64_t i = 0; i < count; ++i) {
      const T *g = gate + i * s.share_step(), *up = dh + i * s.ld, *before = ungated + i * s.ld;
      T* out = du + i * s.ld;
      NF_INDEPENDENT
      for (int64_t c = 0; c < s.net.hidden; ++c) out[c] = up[c] * sigmoid_(g[c]);
      if (!to) continue;
      T* own = to + i * s.share_step();
      NF_INDEPENDENT
      for (int64_t c = 0; c < s.net.hidden; ++c) own[c] = out[c] * before[c] * sigmoid_(-g[c]);
    }
  }

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<NetBackward*>(self);
    const int64_t batch = job.s.net.batch;
    Buffer<T> x(kTileRows * whole_vectors<T>(job.s.net.in)), spare(4 * kTileRows * job.s.ld);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = batch * i / job.chunks, last = batch * (i + 1) / job.chunks;
      for (int64_t row = first; row < last; row += kTileRows)
        job.tile(row, last - row < kTileRows ? last - row : kTileRows, x.data, spare.data,
                 job.sums ? job.sums + i * job.total : nullptr);
    }
  }

  // The chunks' sums, without the padding.
  void write(int64_t from, int64_t rows, int64_t width, int64_t ld, T* to) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < chunks; ++c) {
        const T* part = sums + c * total + from + i * ld;
        T* row = to + i * width;
        if (c == 0) {
          std::memcpy(row, part, width * sizeof(T));
          continue;
        }
        NF_INDEPENDENT
        for (int64_t j = 0; j < width; ++j) row[j] += part[j];
      }
  }
};

template <typename T>
void backward(const DenseNetBackward& k, const Launch& on) {
  const Shape<T> s(k.net);
  const Padded<T> padded(s);
  NetBackward<T> job{k, s, padded, k.net.batch / kChunkRows, 0, {}, {}, nullptr};
  job.chunks = job.chunks < 1 ? 1 : job.chunks > kMostChunks ? kMostChunks : job.chunks;
  for (int64_t l = 0; l < s.count; ++l) {
    job.at[l] = job.total;
    job.bias_at[l] = job.total + s.width(l) * whole_vectors<T>(s.depth(l));
    job.total = job.bias_at[l] + whole_vectors<T>(s.width(l));
  }
  Buffer<T> sums(k.dweights ? job.chunks * job.total : 0);
  job.sums = k.dweights ? sums.data : nullptr;
  if (k.net.batch > 0) on.parallel(job.chunks, grain_of(s, k.net.batch / job.chunks, 2), &job, NetBackward<T>::body);
  for (int64_t l = 0; k.dweights && l < s.count; ++l) {
    job.write(job.at[l], s.width(l), s.depth(l), whole_vectors<T>(s.depth(l)), static_cast<T*>(k.dweights[l]));
    job.write(job.bias_at[l], 1, s.width(l), 0, static_cast<T*>(k.dbiases[l]));
  }
}

}  // namespace

void dense_net_forward(const DenseNetForward& k, const Launch& on) {
  k.net.data == DType::f64 ? forward<double>(k, on) : forward<float>(k, on);
}

void dense_net_backward(const DenseNetBackward& k, const Launch& on) {
  k.net.data == DType::f64 ? backward<double>(k, on) : backward<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
