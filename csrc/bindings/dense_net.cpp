// The raw ops of fully connected conditioners; schemas are defined in nfkernels/ops/dense_net.py. On the CPU alone.
#ifndef NF_CUDA

#include <vector>

#include "../include/cpu_kernels.h"
#include "register.h"
#include "run.h"

namespace nf {
namespace {

using Tensors = std::vector<Tensor>;

// Weights and biases in turn, the first layer's first.
struct Net {
  DenseNet net{};
  std::vector<const void*> weights, biases;

  Net(const Tensor& x, const OptionalTensor& shares, const Tensors& layers, bool residual, int64_t activation,
      int64_t share) {
    check_shape(layers.size() >= 4 && layers.size() % 2 == 0 && layers.size() <= 2 * 66,
                "weights must be a weight and a bias for each of 2 to 66 layers");
    const int64_t count = static_cast<int64_t>(layers.size()) / 2;
    const ScalarType type = x.scalar_type();
    check_shape((type == ScalarType::Float || type == ScalarType::Double) && x.dim() == 2,
                "x must be [B, in] in float32 or float64");
    check_shape(activation >= 0 && activation <= 5 && share >= 0 && share <= 2, "unknown activation or share");
    check_shape(!residual || count % 2 == 0, "a residual net has two layers to a block");
    net.data = dtype_of(x);
    net.batch = x.size(0);
    net.in = x.size(1);
    net.hidden = layers[0].size(0);
    net.layers = count - 2;
    net.residual = residual;
    net.activation = static_cast<NetActivation>(activation);
    net.share = static_cast<Share>(share);
    net.out = layers[layers.size() - 2].size(0);
    for (int64_t l = 0; l < count; ++l) {
      const Tensor &w = layers[2 * l], &b = layers[2 * l + 1];
      const int64_t height = l + 1 == count ? net.out : net.hidden, width = l == 0 ? net.in : net.hidden;
      check_shape(w.dim() == 2 && w.size(0) == height && w.size(1) == width && b.dim() == 1 && b.size(0) == height &&
                      w.scalar_type() == type && b.scalar_type() == type && w.is_contiguous() && b.is_contiguous(),
                  "weights must be contiguous [out, in] and [out], one layer fitting the next, in x's type");
      check_device(x, w);
      check_device(x, b);
      weights.push_back(w.const_data_ptr());
      biases.push_back(b.const_data_ptr());
    }
    net.weights = weights.data();
    net.biases = biases.data();
    net.x = x.const_data_ptr();
    net.x_row = x.stride(0);
    net.x_column = x.stride(1);
    const int64_t blocks = residual ? net.layers / 2 : 0;
    net.share_count = net.share == Share::none ? 0 : net.share == Share::gate ? blocks : blocks + 1;
    check_shape(shares.has_value() == (net.share != Share::none), "shares go with a kind of share");
    if (shares) {
      check_shape(shares->dim() == 2 && shares->size(0) == net.batch && shares->is_contiguous() &&
                      shares->size(1) == net.share_count * net.hidden && shares->scalar_type() == type,
                  "shares must be contiguous [B, shares * hidden], in x's type");
      check_device(x, *shares);
      net.shares = shares->const_data_ptr();
    }
  }
  std::array<int64_t, 3> saved_shape() const {
    return {net.slots(), net.batch, padded_hidden(net.hidden, net.data == DType::f64 ? 8 : 4)};
  }
};

std::tuple<Tensor, Tensor> dense_net_forward(Tensor x, OptionalTensor shares, Tensors layers, bool residual,
                                             int64_t activation, int64_t share, bool save) {
  const Net made(x, shares, layers, residual, activation, share);
  Tensor y = torch::stable::new_empty(x, {made.net.batch, made.net.out}, x.scalar_type());
  const auto shape = made.saved_shape();
  Tensor saved = save ? torch::stable::new_empty(x, {shape[0], shape[1], shape[2]}, x.scalar_type())
                      : new_vector(x, 0, x.scalar_type());
  DenseNetForward io{made.net, y.mutable_data_ptr(), save ? saved.mutable_data_ptr() : nullptr};
  Run on(x);
  cpu_kernels().dense_net_forward(io, on.launch());
  return {y, saved};
}

std::tuple<Tensor, Tensor, Tensors> dense_net_backward(Tensor dy, Tensor x, OptionalTensor shares, Tensor saved,
                                                       Tensors layers, bool residual, int64_t activation, int64_t share,
                                                       bool need_dx, bool need_dshares, bool need_dweights) {
  const Net made(x, shares, layers, residual, activation, share);
  const ScalarType type = x.scalar_type();
  const auto shape = made.saved_shape();
  check_shape(dy.dim() == 2 && dy.size(0) == made.net.batch && dy.size(1) == made.net.out && dy.is_contiguous() &&
                  dy.scalar_type() == type,
              "dy must be contiguous [B, out], in x's type");
  check_shape(saved.dim() == 3 && saved.size(0) == shape[0] && saved.size(1) == shape[1] && saved.size(2) == shape[2] &&
                  saved.is_contiguous() && saved.scalar_type() == type,
              "saved must be what the forward saved");
  check_device(x, dy);
  Tensor dx = need_dx ? torch::stable::new_empty(x, {x.size(0), x.size(1)}, type) : new_vector(x, 0, type);
  Tensor dshares = need_dshares ? torch::stable::empty_like(*shares) : new_vector(x, 0, type);
  Tensors gradients;
  std::vector<void*> dweights, dbiases;
  for (size_t i = 0; need_dweights && i < layers.size(); ++i) {
    gradients.push_back(torch::stable::empty_like(layers[i]));
    (i % 2 ? dbiases : dweights).push_back(gradients.back().mutable_data_ptr());
  }
  DenseNetBackward io{};
  io.net = made.net;
  io.dy = dy.const_data_ptr();
  io.saved = saved.const_data_ptr();
  io.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  io.dshares = need_dshares ? dshares.mutable_data_ptr() : nullptr;
  if (need_dweights) {
    io.dweights = dweights.data();
    io.dbiases = dbiases.data();
  }
  Run on(x);
  cpu_kernels().dense_net_backward(io, on.launch());
  return {dx, dshares, gradients};
}

}  // namespace

void register_dense_net(StableLibrary& library) {
  library.impl("_dense_net_forward", TORCH_BOX(&dense_net_forward));
  library.impl("_dense_net_backward", TORCH_BOX(&dense_net_backward));
}

}  // namespace nf

#endif
