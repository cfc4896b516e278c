// The arithmetic of autoregressive convolutions on packed rows, and packing: squares of lanes x lanes are transposed.
#pragma once

#include <type_traits>
#include <utility>

#include "convert.h"
#include "mix_tile.h"

namespace nf {
namespace NF_ISA {
namespace {

template <typename T>
constexpr int kLanes = Simd<T>::lanes;
constexpr int kMost = NF_VECTOR_BYTES == 64 ? 16 : 12;  // output channels that registers hold at once
constexpr int kLine = 64;
constexpr int64_t kWork = 1 << 18;  // multiply-adds worth a thread

// --- transposing -----------------------------------------------------------------------------------------------------

#if defined(__clang__) || __GNUC__ >= 12
#define NF_CHOOSE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Mask4 __attribute__((vector_size(NF_VECTOR_BYTES)));
typedef int64_t Mask8 __attribute__((vector_size(NF_VECTOR_BYTES)));
#define NF_CHOOSE(a, b, ...) __builtin_shuffle(a, b, std::conditional_t<sizeof(T) == 8, Mask8, Mask4>{__VA_ARGS__})
#endif

// Swaps the off-diagonal halves of 2 step x 2 step squares.
template <typename T, int step, int... l>
inline __attribute__((always_inline)) void exchange(typename Simd<T>::type (&rows)[kLanes<T>],
                                                    std::integer_sequence<int, l...>) {
  constexpr int n = kLanes<T>;
  NF_UNROLL
  for (int i = 0; i < n; ++i) {
    if (i & step) continue;
    const auto a = rows[i], b = rows[i + step];
    rows[i] = NF_CHOOSE(a, b, ((l & step) ? n + l - step : l)...);
    rows[i + step] = NF_CHOOSE(a, b, ((l & step) ? n + l : l + step)...);
  }
}

template <typename T, int step = kLanes<T> / 2>
inline __attribute__((always_inline)) void transpose_square(typename Simd<T>::type (&rows)[kLanes<T>]) {
  exchange<T, step>(rows, std::make_integer_sequence<int, kLanes<T>>());
  if constexpr (step > 1) transpose_square<T, step / 2>(rows);
}

// One row of up to kLanes samples, to and from [column][channel][lane]; columns from the right if reversed. The row
// after it is asked for meanwhile: these are more streams than the hardware follows.
template <typename T>
struct Square {
  static constexpr int n = kLanes<T>;
  const View& v;
  bool direct;  // whole registers can be read and written where the data lies
  int64_t size;
  int64_t first;
  int count;
  bool reverse;

  Square(const View& view, DType data, int64_t b, int samples, bool mirrored)
      : v(view),
        direct(view.p == 1 && size_of(data) == sizeof(T)),
        size(size_of(data)),
        first(b),
        count(samples),
        reverse(mirrored) {}

  char* at(int64_t lane, int64_t c, int64_t p) const {
    return static_cast<char*>(v.data) + ((first + lane) * v.b + c * v.c + p * v.p) * size;
  }

  void read(int64_t row, int64_t width, int64_t channels, LoadRun<T> load, T* to) const {
    using V = Simd<T>;
    typename V::type square[n];
    T spare[n * n] = {};
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t w = 0; w < width; w += n) {
        const int columns = static_cast<int>(width - w < n ? width - w : n);
        const int64_t p = row * width + (reverse ? width - w - columns : w), after = reverse ? -width : width;
        if (direct && columns == n && count == n) {
          NF_UNROLL
          for (int i = 0; i < n; ++i) {
            square[i] = V::load(reinterpret_cast<const T*>(at(i, c, p)));
            __builtin_prefetch(at(i, c, p + after), 0, 2);
          }
        } else {
          for (int i = 0; i < count; ++i) load(at(i, c, p), v.p, columns, spare + i * n);
          NF_UNROLL
          for (int i = 0; i < n; ++i) square[i] = V::load(spare + i * n);
        }
        transpose_square<T>(square);
        T* made = to + (w * channels + c) * n;
        if (columns == n) {
          NF_UNROLL
          for (int i = 0; i < n; ++i) V::store(made + (reverse ? n - 1 - i : i) * channels * n, square[i]);
        } else {
          T lines[n * n];
          NF_UNROLL
          for (int i = 0; i < n; ++i) V::store(lines + i * n, square[i]);
          for (int i = 0; i < columns; ++i)
            V::store(made + (reverse ? columns - 1 - i : i) * channels * n, V::load(lines + i * n));
        }
      }
  }

  void write(int64_t row, int64_t width, int64_t channels, StoreRun<T> store, const T* from) const {
    using V = Simd<T>;
    typename V::type square[n];
    T spare[n * n] = {};
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t w = 0; w < width; w += n) {
        const int columns = static_cast<int>(width - w < n ? width - w : n);
        const int64_t p = row * width + (reverse ? width - w - columns : w), after = reverse ? -width : width;
        const T* made = from + (w * channels + c) * n;
        if (columns == n) {
          NF_UNROLL
          for (int i = 0; i < n; ++i) square[i] = V::load(made + (reverse ? n - 1 - i : i) * channels * n);
        } else {
          for (int i = 0; i < columns; ++i)
            V::store(spare + i * n, V::load(made + (reverse ? columns - 1 - i : i) * channels * n));
          NF_UNROLL
          for (int i = 0; i < n; ++i) square[i] = V::load(spare + i * n);
        }
        transpose_square<T>(square);
        if (direct && columns == n && count == n) {
          NF_UNROLL
          for (int i = 0; i < n; ++i) {
            V::store(reinterpret_cast<T*>(at(i, c, p)), square[i]);
            __builtin_prefetch(at(i, c, p + after), 1, 2);
          }
        } else {
          T lines[n * n];
          NF_UNROLL
          for (int i = 0; i < n; ++i) V::store(lines + i * n, square[i]);
          for (int i = 0; i < count; ++i) store(at(i, c, p), v.p, columns, lines + i * n);
        }
      }
  }
};

// --- rows ------------------------------------------------------------------------------------------------------------

// The row in the making, and those before it that the taps reach, with zeros around.
template <typename T>
struct ConvRows {
  int64_t pixel;  // elements of one
  int64_t width, left, pitch, kept;
  bool solve;
  Buffer<T> other, ring;  // other: the rows that no later row needs

  ConvRows(const AutoregressiveConv& k, int64_t elements)
      : pixel(elements),
        width(k.width),
        left(k.form.columns / 2),
        pitch((k.width + left + (k.form.raster ? left : 0)) * elements),
        kept(k.form.rows / 2 + 1),
        solve(k.form.solve),
        other(k.width * elements),
        ring(kept * pitch) {}

  void clear() { std::memset(ring.data, 0, kept * pitch * sizeof(T)); }
  T* line(int64_t i) const { return ring.data + (i + kept) % kept * pitch + left * pixel; }
  T* input(int64_t i) const { return solve ? other.data : line(i); }
  T* output(int64_t i) const { return solve ? line(i) : other.data; }
};

enum class Lanes { unused, samples, channels };

// Channels [0, R) of a pixel of kLanes samples. w: [taps, channels, R]; the nearest pixels come last, so that the
// others' products need not wait for them.
template <typename T, int R>
void pixel_of_samples(const T* w, const T* bias, const T* const* sources, int taps, int64_t channels, T* out) {
  using V = Simd<T>;
  typename V::type acc[R];
  NF_UNROLL
  for (int r = 0; r < R; ++r) acc[r] = typename V::type{} + bias[r];
  for (int t = 0; t < taps; ++t) {
    const T* from = sources[t];
    for (int64_t c = 0; c < channels; ++c) {
      const typename V::type in = V::load(from + c * V::lanes);
      NF_UNROLL
      for (int r = 0; r < R; ++r) acc[r] += w[r] * in;
      w += R;
    }
  }
  NF_UNROLL
  for (int r = 0; r < R; ++r) V::store(out + r * V::lanes, acc[r]);
}

// kLanes N channels of a pixel of one sample. w: [taps, channels, padded]; U sums at once, of every U-th term.
template <typename T, int N, int U>
void pixel_of_channels(const T* w, int64_t padded, const T* bias, const T* const* sources, int taps, int64_t channels,
                       T* out) {
  using V = Simd<T>;
  typename V::type acc[U][N];
  NF_UNROLL
  for (int u = 0; u < U; ++u) NF_UNROLL
  for (int i = 0; i < N; ++i) acc[u][i] = u ? typename V::type{} : V::load(bias + i * V::lanes);
  for (int t = 0; t < taps; ++t) {
    const T* from = sources[t];
    int64_t c = 0;
    for (; c + U <= channels; c += U) {
      NF_UNROLL
      for (int u = 0; u < U; ++u) NF_UNROLL
      for (int i = 0; i < N; ++i) acc[u][i] += from[c + u] * V::load(w + u * padded + i * V::lanes);
      w += U * padded;
    }
    for (; c < channels; ++c) {
      NF_UNROLL
      for (int i = 0; i < N; ++i) acc[0][i] += from[c] * V::load(w + i * V::lanes);
      w += padded;
    }
  }
  NF_UNROLL
  for (int i = 0; i < N; ++i) {
    NF_UNROLL
    for (int u = 1; u < U; ++u) acc[0][i] += acc[u][i];
    V::store(out + i * V::lanes, acc[0][i]);
  }
}

// The weights in the order they are read, farthest tap first, and a row of products with them.
template <typename T>
struct ConvWeights {
  const AutoregressiveConv& k;
  Lanes lanes;
  int64_t taps, channels, padded, blocks;
  Buffer<T> packed, bias;

  ConvWeights(const AutoregressiveConv& conv, Lanes across)
      : k(conv),
        lanes(across),
        taps(tap_count(conv.form)),
        channels(conv.channels),
        padded((conv.channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        blocks((conv.channels + kMost - 1) / kMost),
        packed(across == Lanes::unused ? 0 : taps * channels * padded),
        bias(padded) {
    if (lanes == Lanes::unused) return;
    const auto *w = static_cast<const T*>(conv.weight), *b = static_cast<const T*>(conv.bias);
    for (int64_t o = 0; b && o < channels; ++o) bias.data[o] = b[o];
    T* to = packed.data;
    const auto add = [&](int64_t first, int64_t last, int64_t end) {
      for (int64_t t = taps; t-- > 0;)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t o = first; o < end; ++o) *to++ = o < last ? w[(t * channels + o) * channels + c] : T(0);
    };
    if (lanes == Lanes::channels)
      add(0, channels, padded);
    else
      for (int64_t i = 0; i < blocks; ++i)
        add(channels * i / blocks, channels * (i + 1) / blocks, channels * (i + 1) / blocks);
  }

  void row(const ConvRows<T>& rows, int64_t i) const {
    Buffer<const T*> sources(taps);
    for (int64_t t = 0; t < taps; ++t) {
      int h, w;
      tap_offset(k.form, static_cast<int>(taps - 1 - t), &h, &w);
      sources.data[t] = t == taps - 1 ? rows.input(i) : rows.line(i - h) - w * rows.pixel;
    }
    T* out = rows.output(i);
    for (int64_t x = 0; x < rows.width; ++x) {
      lanes == Lanes::samples ? samples(sources.data, out) : across(sources.data, out);
      out += rows.pixel;
      for (int64_t t = 0; t < taps; ++t) sources.data[t] += rows.pixel;
    }
  }

  void samples(const T* const* sources, T* out) const {
    using F = void (*)(const T*, const T*, const T* const*, int, int64_t, T*);
#define NF_FOUR(R) \
  pixel_of_samples<T, R + 1>, pixel_of_samples<T, R + 2>, pixel_of_samples<T, R + 3>, pixel_of_samples<T, R + 4>
    static const F table[] = {nullptr, NF_FOUR(0), NF_FOUR(4), NF_FOUR(8),
#if NF_VECTOR_BYTES == 64
                              NF_FOUR(12)
#endif
    };
#undef NF_FOUR
    const T* w = packed.data;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = channels * i / blocks, r = channels * (i + 1) / blocks - first;
      table[r](w, bias.data + first, sources, static_cast<int>(taps), channels, out + first * kLanes<T>);
      w += taps * channels * r;
    }
  }

  void across(const T* const* sources, T* out) const {
    constexpr int n = kLanes<T>;
    int64_t o = 0;
    for (; o + 4 * n <= padded; o += 4 * n)
      pixel_of_channels<T, 4, 2>(packed.data + o, padded, bias.data + o, sources, static_cast<int>(taps), channels,
                                 out + o);
    for (; o + 2 * n <= padded; o += 2 * n)
      pixel_of_channels<T, 2, 4>(packed.data + o, padded, bias.data + o, sources, static_cast<int>(taps), channels,
                                 out + o);
    for (; o < padded; o += n)
      pixel_of_channels<T, 1, 4>(packed.data + o, padded, bias.data + o, sources, static_cast<int>(taps), channels,
                                 out + o);
  }
};

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
