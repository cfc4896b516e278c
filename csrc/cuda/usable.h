// What this build can run on.
#pragma once

#include <string>

namespace nf {
namespace cuda {

// Why the kernels cannot run on a device (an old driver, none of the images "sm_90,compute_80" fits it), as one
// sentence; empty if they can.
std::string why_unusable(int device, const std::string& images);

int multiprocessors(int device);

// The nvcc that compiled the kernels, as "nvcc 13.0.88".
const char* compiler();

}  // namespace cuda
}  // namespace nf
