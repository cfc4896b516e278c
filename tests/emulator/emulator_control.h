// How kernels are run: what the Python modules set and read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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

// Every kernel launched so far: its name, its threads and the most shared memory it asked for.
struct Shape {
  std::string kernel;
  int threads;
  size_t shared_bytes;
};
std::vector<Shape> shapes();

}  // namespace emulator
}  // namespace nf
