// What this build can run on. The only file here that the emulator does not play: it asks the driver.

#ifndef NF_EMULATED

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <sstream>

namespace nf {
namespace cuda {
namespace {

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

// Machine code serves its own major version from its minor one on, PTX everything from its version on.
bool serves(const std::string& image, int capability) {
  const size_t digits = image.find('_') + 1;
  const int built = std::stoi(image.substr(digits));
  return image[0] == 's' ? built / 10 == capability / 10 && built <= capability : built <= capability;
}

}  // namespace

std::string why_unusable(int device, const std::string& images) {
  int driver = 0, runtime = 0, major = 0, minor = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "there is no NVIDIA driver";
  if (driver < runtime / 1000 * 1000)  // drivers serve every minor version of their major one
    return "the driver is for CUDA " + version(driver) + ", nfkernels._C_cuda was built with CUDA " + version(runtime);
  // Attributes need no context: asking about a GPU must not take memory on it.
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return std::string("CUDA says: ") + cudaGetErrorString(error);
  std::stringstream list(images);
  for (std::string image; std::getline(list, image, ',');)
    if (serves(image, major * 10 + minor)) return "";
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  return "nfkernels._C_cuda was built for " + images + " and this GPU is " + capability +
         ": build it with TORCH_CUDA_ARCH_LIST=" + capability;
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
