// The raw autoregressive inverse op; its schema is defined in nfkernels/ops/autoregressive_inverse.py.

#include <vector>

#include "../include/kernels.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

constexpr int64_t kAffine = 0, kSpline = 1;  // the first number of a form

struct Network {
  std::vector<Tensor> weights;
  std::vector<OptionalTensor> biases, contexts;
};

void check_floats(const Tensor& z, const Tensor& t) {
  check_shape(t.scalar_type() == z.scalar_type() && t.is_contiguous(),
              "weights, biases and contexts must be like z, "
              "contiguous");
  check_device(z, t);
}

void fill_layers(AutoregressiveInverse& k, const Tensor& z, const Network& net, const std::vector<int64_t>& residual) {
  const int64_t layers = static_cast<int64_t>(net.weights.size()) - 1;
  check_shape(layers >= 1 && layers <= kMostLayers && static_cast<int64_t>(net.biases.size()) == layers + 1 &&
                  static_cast<int64_t>(net.contexts.size()) == layers &&
                  static_cast<int64_t>(residual.size()) == layers,
              "expected 1 to 8 hidden layers, each with a weight, a bias, a context and a residual");
  k.layers = static_cast<int>(layers);
  int64_t inputs = k.features;
  for (int64_t i = 0; i <= layers; ++i) {
    MaskedLayer& layer = k.layer[i];
    const Tensor& weight = net.weights[i];
    check_shape(weight.dim() == 2 && weight.size(1) == inputs, "a weight must be [out, in]");
    check_floats(z, weight);
    layer.inputs = inputs;
    layer.width = inputs = weight.size(0);
    layer.weight = weight.const_data_ptr();
    layer.residual = -1;
    if (net.biases[i]) {
      check_shape(net.biases[i]->numel() == layer.width, "a bias must be [out]");
      check_floats(z, *net.biases[i]);
      layer.bias = net.biases[i]->const_data_ptr();
    }
    if (i == layers) break;
    if (net.contexts[i]) {
      const Tensor& context = *net.contexts[i];
      check_shape(context.dim() == 2 && context.size(0) == k.batch && context.size(1) == layer.width,
                  "a context must be [B, out]");
      check_floats(z, context);
      layer.context = read(context);
    }
    const int64_t earlier = residual[i];
    check_shape(earlier >= -1 && earlier < i && (earlier < 0 || k.layer[earlier].width == layer.width),
                "a residual must be -1 or an earlier layer of the same width");
    layer.residual = static_cast<int>(earlier);
  }
  check_shape(k.layer[layers].width == k.features * k.per_feature, "the last weight must have each feature's params");
}

void fill_transform(AutoregressiveInverse& k, const std::vector<int64_t>& form, const std::vector<double>& c) {
  if (form.size() == 3 && form[0] == kSpline && c.size() == 9) {
    check_shape(form[1] >= 2 && form[1] <= kSplineMostBins && (form[2] & 3) < 3, "a spline has 2 to 64 bins");
    unpack_form(k.spline, form[1], form[2]);
    k.spline.numbers = {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8]};
    k.per_feature = k.spline.count();
    return;
  }
  check_shape(form.size() == 2 && form[0] == kAffine && c.size() == 5, "unknown elementwise transform");
  unpack_form(k.affine, form[1]);
  k.affine.constants = {c[0], c[1], c[2], c[3], c[4]};
  k.affine.transformed = 1;
  k.per_feature = k.affine.has_scale() ? 2 : 1;
  check_shape(k.affine.interleaved || !k.affine.has_scale(), "params must lie feature by feature");
}

#ifndef NF_CUDA
// The kernels index by the table's numbers; a GPU's cannot be looked at without waiting for it.
void check_table(const AutoregressiveInverse& k) {
  const auto rises = [&](const int32_t* offsets, int64_t most) {
    bool ok = offsets[0] == 0 && offsets[k.passes] <= most;
    for (int64_t g = 0; g < k.passes; ++g) ok = ok && offsets[g] <= offsets[g + 1];
    return ok;
  };
  bool ok = rises(k.feature_offsets(), k.features);
  for (int64_t i = 0; i < k.features; ++i) ok = ok && k.order()[i] >= 0 && k.order()[i] < k.features;
  for (int i = 0; i < k.layers; ++i) ok = ok && rises(k.unit_offsets(i), k.layer[i].width);
  check_shape(ok, "the table of degrees does not fit the weights");
}
#endif

std::tuple<Tensor, Tensor> autoregressive_inverse_forward(Tensor z, std::vector<Tensor> weights,
                                                          std::vector<OptionalTensor> biases,
                                                          std::vector<OptionalTensor> contexts, Tensor table,
                                                          int64_t passes, int64_t activation,
                                                          std::vector<int64_t> residual, bool final_activation,
                                                          std::vector<int64_t> form, std::vector<double> constants) {
  AutoregressiveInverse k{};
  check_shape(z.dim() == 2, "z must be [B, D]");
  k.data = dtype_of(z);
  check_shape(k.data == DType::f32 || k.data == DType::f64, "z must be float32 or float64");
  check_shape(activation >= 0 && activation <= static_cast<int>(Activation::tanh), "unknown activation");
  k.batch = z.size(0);
  k.features = z.size(1);
  k.passes = passes;
  k.activation = static_cast<Activation>(activation);
  k.final_activation = final_activation;
  fill_transform(k, form, constants);
  fill_layers(k, z, {std::move(weights), std::move(biases), std::move(contexts)}, residual);
  check_shape(passes >= 0 && passes <= k.features && table.scalar_type() == ScalarType::Int && table.is_contiguous() &&
                  table.numel() == (passes + 1) * (k.layers + 1) + k.features,
              "table must be int32, as Degrees makes it");
  check_device(z, table);
  k.table = static_cast<const int32_t*>(table.const_data_ptr());
#ifndef NF_CUDA
  check_table(k);
#endif
  Tensor x = torch::stable::empty_like(z), logdet = new_vector(z, k.batch, z.scalar_type());
  k.z = read(z);
  k.x = write(x);
  k.logdet = logdet.mutable_data_ptr();
  Run on(z);
  kernels().autoregressive_inverse_forward(k, on.launch());
  return {x, logdet};
}

}  // namespace

void register_autoregressive_inverse(StableLibrary& library) {
  library.impl("_autoregressive_inverse_forward", TORCH_BOX(&autoregressive_inverse_forward));
}

}  // namespace nf
