// Tiles [rows, kTile] of columns for triangle sweeps: packed from any layout and type with rows in an order of their
// own, and the group of columns that is swept at once.
#pragma once

#include <utility>

#include "mix_pack.h"

namespace nf {
namespace NF_ISA {
namespace {

// Rows not a power of two apart: a group's part of a whole tile then finds its place in the first cache.
template <typename T>
constexpr int64_t pitch() {
  return kTile + Simd<T>::lanes;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define NF_CAN_SHUFFLE
#endif
#endif

#ifdef NF_CAN_SHUFFLE
// One step of a transposition: elements whose row and column differ in one bit change places.
template <int bit, typename V, int... i>
void exchange(V& a, V& b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  const V low = __builtin_shufflevector(a, b, (i & bit ? n + i - bit : i)...);
  b = __builtin_shufflevector(a, b, (i & bit ? n + i : i + bit)...);
  a = low;
}

template <int bit, typename V, int n>
void exchange_rows(V (&rows)[n]) {
  NF_UNROLL
  for (int i = 0; i < n; ++i)
    if (!(i & bit)) exchange<bit>(rows[i], rows[i | bit], std::make_integer_sequence<int, n>());
  if constexpr (bit > 1) exchange_rows<bit / 2>(rows);
}

// to(i)[0 .. lanes) = column i of the square whose rows begin at from(i).
template <typename T, typename From, typename To>
void transpose_square(From&& from, To&& to) {
  using V = Simd<T>;
  typename V::type rows[V::lanes];
  NF_UNROLL
  for (int i = 0; i < V::lanes; ++i) rows[i] = V::load(from(i));
  exchange_rows<V::lanes / 2>(rows);
  NF_UNROLL
  for (int i = 0; i < V::lanes; ++i) V::store(to(i), rows[i]);
}
#endif

// tile[place[c], n] = v for channels x columns [n0, n1); zero in the rows up to `size` that no channel has and in the
// columns up to a whole group: what is not finite must not stay from another tile.
template <typename T, DType d>
void pack_rows(const View& v, int64_t channels, int64_t positions, int64_t n0, int64_t n1, const int64_t* place,
               int64_t size, T* tile) {
  using S = typename Storage<d>::type;
  constexpr int64_t ld = pitch<T>();
  const auto* base = static_cast<const S*>(v.data);
  stretches(n0, n1, positions, [&](int64_t b, int64_t p, int64_t at, int64_t length) {
    const S* from = base + b * v.b + p * v.p;
    int64_t first = 0;  // channel that is still to be packed
#ifdef NF_CAN_SHUFFLE
    constexpr int64_t lanes = Simd<T>::lanes;
    if constexpr (d == native<T>()) {
      if (v.c == 1 && v.p != 1) {
        const int64_t whole = length / lanes * lanes;
        for (; first + lanes <= channels; first += lanes) {
          for (int64_t i = 0; i < whole; i += lanes)
            transpose_square<T>([&](int64_t k) { return from + (i + k) * v.p + first; },
                                [&](int64_t k) { return tile + place[first + k] * ld + at + i; });
          for (int64_t i = whole; i < length; ++i)
            for (int64_t c = first; c < first + lanes; ++c) tile[place[c] * ld + at + i] = from[i * v.p + c];
        }
      }
    }
#endif
    for (int64_t c = first; c < channels; ++c) {
      const S* row = from + c * v.c;
      T* to = tile + place[c] * ld + at;
      if (v.p == 1)
        for (int64_t i = 0; i < length; ++i) to[i] = static_cast<T>(Storage<d>::load(row[i]));
      else
        for (int64_t i = 0; i < length; ++i) to[i] = static_cast<T>(Storage<d>::load(row[i * v.p]));
    }
  });
  const int count = static_cast<int>(n1 - n0), whole = padded<T>(count);
  if (whole > count)
    for (int64_t c = 0; c < channels; ++c)
      for (int i = count; i < whole; ++i) tile[c * ld + i] = T(0);
  for (int64_t c = channels; c < size; ++c) std::memset(tile + c * ld, 0, whole * sizeof(T));
}

template <typename T, DType d>
void unpack_rows(const View& v, int64_t channels, int64_t positions, int64_t n0, int64_t n1, const int64_t* place,
                 const T* tile) {
  using S = typename Storage<d>::type;
  constexpr int64_t ld = pitch<T>();
  auto* base = static_cast<S*>(v.data);
  stretches(n0, n1, positions, [&](int64_t b, int64_t p, int64_t at, int64_t length) {
    S* to = base + b * v.b + p * v.p;
    int64_t first = 0;
#ifdef NF_CAN_SHUFFLE
    constexpr int64_t lanes = Simd<T>::lanes;
    if constexpr (d == native<T>()) {
      if (v.c == 1 && v.p != 1) {
        const int64_t whole = length / lanes * lanes;
        for (; first + lanes <= channels; first += lanes) {
          for (int64_t i = 0; i < whole; i += lanes)
            transpose_square<T>([&](int64_t k) { return tile + place[first + k] * ld + at + i; },
                                [&](int64_t k) { return to + (i + k) * v.p + first; });
          for (int64_t i = whole; i < length; ++i)
            for (int64_t c = first; c < first + lanes; ++c) to[i * v.p + c] = tile[place[c] * ld + at + i];
        }
      }
    }
#endif
    for (int64_t c = first; c < channels; ++c) {
      S* row = to + c * v.c;
      const T* from = tile + place[c] * ld + at;
      if (v.p == 1)
        for (int64_t i = 0; i < length; ++i) row[i] = Storage<d>::store(from[i]);
      else
        for (int64_t i = 0; i < length; ++i) row[i * v.p] = Storage<d>::store(from[i]);
    }
  });
}

template <typename T>
struct RowPacking {
  void (*pack)(const View&, int64_t, int64_t, int64_t, int64_t, const int64_t*, int64_t, T*);
  void (*unpack)(const View&, int64_t, int64_t, int64_t, int64_t, const int64_t*, const T*);
};

template <typename T>
RowPacking<T> row_packing_for(DType d) {
  static const RowPacking<T> table[] = {{pack_rows<T, DType::f32>, unpack_rows<T, DType::f32>},
                                        {pack_rows<T, DType::f64>, unpack_rows<T, DType::f64>},
                                        {pack_rows<T, DType::bf16>, unpack_rows<T, DType::bf16>},
                                        {pack_rows<T, DType::f16>, unpack_rows<T, DType::f16>}};
  return table[static_cast<int>(d)];
}

// A group of columns: what triangle_sweep.h computes at once.
template <typename T>
struct Group {
  using Scalar = T;
  static constexpr int parts = 1, part = 0;
  using V = Simd<T>;
  struct Value {
    typename V::type part[kVectors];
  };
  T* data;  // row 0

  NF_FN Value fill(T a) {
    Value v;
    NF_UNROLL
    for (int i = 0; i < kVectors; ++i) v.part[i] = typename V::type{} + a;
    return v;
  }
  template <int rows>
  NF_FN const T* at(const T* address) {
    return address;
  }
  NF_FN void add(Value& sum, T a, const Value& x) {
    NF_UNROLL
    for (int i = 0; i < kVectors; ++i) sum.part[i] += a * x.part[i];
  }
  NF_FN Value scaled_difference(const Value& x, const Value& y, T a) {
    Value v;
    NF_UNROLL
    for (int i = 0; i < kVectors; ++i) v.part[i] = (x.part[i] - y.part[i]) * a;
    return v;
  }
  inline __attribute__((always_inline)) Value load(int64_t row) const {
    Value v;
    NF_UNROLL
    for (int i = 0; i < kVectors; ++i) v.part[i] = V::load(data + row * pitch<T>() + i * V::lanes);
    return v;
  }
  inline __attribute__((always_inline)) void store(int64_t row, const Value& v) const {
    NF_UNROLL
    for (int i = 0; i < kVectors; ++i) V::store(data + row * pitch<T>() + i * V::lanes, v.part[i]);
  }
};

// Samples that lie one behind the other in every view are one long sample.
inline void join_samples(int64_t& batch, int64_t& positions, View* const* views, int n) {
  bool joined = true;
  for (int i = 0; i < n; ++i) {
    if (positions == 1) views[i]->p = views[i]->b;
    joined = joined && (batch == 1 || views[i]->b == positions * views[i]->p);
  }
  if (!joined) return;
  positions *= batch;
  batch = 1;
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf
