// How kernels are run: what the Python modules set and read.
#pragma once

#include <cstdint>
#include <string>

namespace nf {
namespace emulator {

// In which order the threads of a block, and the blocks, take their turns. Threads run until they wait.
struct Order {
  enum Kind { forward, reverse, random } kind = forward;
  uint64_t seed = 0;
};
void set_order(const std::string& name, uint64_t seed);

struct Counters {
  int64_t launches = 0, blocks = 0, barriers = 0;
};
Counters& counters();

}  // namespace emulator
}  // namespace nf
