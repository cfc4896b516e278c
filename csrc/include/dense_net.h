// Fully connected conditioners, all layers in one pass over the rows, and their gradients; to the CPU's kernels.
#pragma once

#include "types.h"

namespace nf {

// LeakyReLU has slope 0.01, ELU has alpha 1.
enum class NetActivation : int { relu = 0, leaky_relu, elu, tanh, silu, softplus };

// What a context's linear map does: nothing, gates every block's output by its sigmoid, or is added to it.
enum class Share : int { none = 0, gate, add };

struct DenseNet {
  DType data;  // f32 or f64, of everything
  int64_t batch, in, hidden, out;
  int64_t layers;  // hidden x hidden ones, two to a block where residual
  bool residual;   // h + W2 act(W1 act(h)), else act(W h)
  NetActivation activation;
  Share share;
  const void* const* weights;  // [layers + 2], each [out, in] as nn.Linear's
  const void* const* biases;   // [layers + 2]
  const void* x;               // [batch, in] at these strides
  int64_t x_row, x_column;
  const void*
      shares;  // [batch, shares, hidden], or null: gates of each block, or addends of the first layer and each block
  int64_t share_count;

  // Of what is saved for the backward, [slots, batch, padded hidden]: the first layer's output, each hidden one's (of
  // a block's second its sum), and where gated each block's before its gate.
  int64_t slots() const { return 1 + layers + (share == Share::gate ? layers / 2 : 0); }
};

// Saved rows are whole cache lines.
inline int64_t padded_hidden(int64_t hidden, int64_t element_bytes) {
  const int64_t line = 64 / element_bytes;
  return (hidden + line - 1) / line * line;
}

struct DenseNetForward {
  DenseNet net;
  void* y;      // [batch, out]
  void* saved;  // or null
};

struct DenseNetBackward {
  DenseNet net;
  const void* dy;         // [batch, out]
  const void* saved;      // as the forward gave it
  void* dx;               // [batch, in], or null
  void* dshares;          // like shares, or null
  void* const* dweights;  // [layers + 2], or null: neither these nor the biases'
  void* const* dbiases;
};

}  // namespace nf
