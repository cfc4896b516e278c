// The CUDA kernels' table.

#include "../include/kernels.h"

namespace nf {
namespace cuda {
NF_KERNELS(NF_DECLARE_KERNEL)
}

const Kernels& kernels() {
#define NF_ENTRY(name, ...) cuda::name,
  static const Kernels table = {NF_KERNELS(NF_ENTRY)};
  return table;
}

}  // namespace nf
