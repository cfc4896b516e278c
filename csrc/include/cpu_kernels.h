// The kernels of raw ops that the CPU alone has kernels for, a pointer for each (cpu/isa.cpp); in nfkernels._C only.
#pragma once

#include "channel_affine.h"
#include "dense_net.h"
#include "kernels.h"
#include "lu_layer.h"

#define NF_CPU_KERNELS(KERNEL)                                  \
  KERNEL(channel_affine_forward, const ChannelAffineForward&)   \
  KERNEL(channel_affine_backward, const ChannelAffineBackward&) \
  KERNEL(dense_net_forward, const DenseNetForward&)             \
  KERNEL(dense_net_backward, const DenseNetBackward&)           \
  KERNEL(lu_layer_forward, const LULayerForward&)               \
  KERNEL(lu_layer_backward, const LULayerBackward&)

namespace nf {

struct CpuKernels {
  NF_CPU_KERNELS(NF_KERNEL_POINTER)
};

const CpuKernels& cpu_kernels();

}  // namespace nf
