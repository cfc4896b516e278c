// The inverse of a masked autoregressive layer, to every kernel: z -> x with z_i = f(x_i; p_i(x_{< i})), params p from
// a masked network whose units are computed as their degree's turn comes.
#pragma once

#include "affine_coupling.h"
#include "rational_quadratic_spline.h"

namespace nf {

// As in nfkernels/reference/autoregressive_inverse.py.
enum class Activation : int { relu = 0, leaky_relu, elu, silu, tanh };

constexpr int kMostLayers = 8;  // hidden ones

struct MaskedLayer {
  const void* weight;  // [width, inputs], row-major; the last layer's rows are the params, feature by feature
  const void* bias;    // [width] or null
  View context;        // [batch, width], what is added to a hidden layer; data null: nothing
  int64_t width, inputs;
  int residual;  // the earlier layer whose sums are added, or -1
};

struct AutoregressiveInverse {
  DType data;  // f32 or f64: of everything
  int64_t batch, features, passes;
  View z, x;
  void* logdet;  // [batch]
  int layers;    // hidden ones; the params' layer comes after them
  MaskedLayer layer[kMostLayers + 1];
  Activation activation;
  bool final_activation;  // between the last hidden layer and the params
  int64_t per_feature;    // params
  Coupling affine;        // f where it is affine: its map, formula and direction
  SplineForm spline;      // f where it is a spline; without bins where it is not
  // Counts of features of degrees below 0 .. passes; the features in the order of their degrees; counts of each hidden
  // layer's units likewise.
  const int32_t* table;

  const int32_t* feature_offsets() const { return table; }
  const int32_t* order() const { return table + passes + 1; }
  const int32_t* unit_offsets(int64_t i) const { return table + passes + 1 + features + i * (passes + 1); }
};

namespace {

// e^x - 1, without cancellation, for x <= 0.
NF_FN float expm1_below(float x) {
  float p = 1.9841270e-4f;
  p = p * x + 1.3888889e-3f;
  p = p * x + 8.3333333e-3f;
  p = p * x + 4.1666667e-2f;
  p = p * x + 0.16666667f;
  p = p * x + 0.5f;
  p = p * x * x + x;
  return x < -0.35f ? exp_(x) - 1.0f : p;
}
NF_FN double expm1_below(double x) { return std::expm1(x); }

template <typename T, Activation kind>
NF_FN T activated(T v) {
  if constexpr (kind == Activation::relu) {
    return v < T(0) ? T(0) : v;  // NaN stays
  } else if constexpr (kind == Activation::leaky_relu) {
    return v < T(0) ? v * T(0.01) : v;
  } else if constexpr (kind == Activation::elu) {
    const T below = expm1_below(v < T(0) ? v : T(0));
    return v < T(0) ? below : v;
  } else if constexpr (kind == Activation::silu) {
    const T u = exp_minus_abs(v);
    return v * ((v >= T(0) ? T(1) : u) * reciprocal_1_2(T(1) + u));
  } else {
    return tanh_(v);
  }
}

}  // namespace
}  // namespace nf
