// The CUDA kernels' table.

#include "../include/kernels.h"

namespace nf {
namespace cuda {
#define NF_DECLARE_WEAK(name, ...) __attribute__((weak)) void name(__VA_ARGS__, const Launch&);
NF_KERNELS(NF_DECLARE_WEAK)
}  // namespace cuda

const Kernels& kernels() {
#define NF_ENTRY(name, ...) cuda::name,
  static const Kernels table = {NF_KERNELS(NF_ENTRY)};
  return table;
}

}  // namespace nf
