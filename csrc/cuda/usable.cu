// What this build can run on. The only file here that the emulator does not play: it asks the driver.

#ifndef NF_EMULATED

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "usable.h"

namespace nf {
namespace cuda {

// Compiled for every architecture that the kernels are compiled for.
__global__ void probe() {}

namespace {

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

}  // namespace

std::string why_unusable(int device) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "there is no NVIDIA driver";
  if (driver < runtime / 1000 * 1000)  // drivers serve every minor version of their major one
    return "the driver is for CUDA " + version(driver) + ", nfkernels._C_cuda was built with CUDA " + version(runtime);
  int previous = 0;
  cudaGetDevice(&previous);
  cudaError_t error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
  cudaGetLastError();  // the question must not haunt the next launch
  cudaSetDevice(previous);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return "nfkernels._C_cuda has no image for this GPU's architecture; build it with TORCH_CUDA_ARCH_LIST set to it";
  if (error != cudaSuccess) return std::string("CUDA says: ") + cudaGetErrorString(error);
  return "";
}

int multiprocessors(int device) {
  static std::array<std::atomic<int>, 64> known{};
  const bool cached = device >= 0 && device < static_cast<int>(known.size());
  int count = cached ? known[device].load(std::memory_order_relaxed) : 0;
  if (count > 0) return count;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count < 1) count = 1;
  if (cached) known[device].store(count, std::memory_order_relaxed);
  return count;
}

#define NF_TEXT_(x) #x
#define NF_TEXT(x) NF_TEXT_(x)
const char* compiler() {
  return "nvcc " NF_TEXT(__CUDACC_VER_MAJOR__) "." NF_TEXT(__CUDACC_VER_MINOR__) "." NF_TEXT(__CUDACC_VER_BUILD__);
}

}  // namespace cuda
}  // namespace nf

#endif
