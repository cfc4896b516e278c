// Where an op runs: the threads of the CPU, or the current stream of the tensors' GPU.
#pragma once

#include <vector>

#include "tensors.h"

#ifdef NF_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace nf {

#ifdef NF_CUDA
// csrc/bindings/module_cuda.cpp; in tests the emulator's.
void* current_stream(int device);
int multiprocessors(int device);
#else
inline void run_parallel(int64_t n, int64_t grain, void* ctx, Body body) {
  if (n <= grain) {
    body(ctx, 0, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
}
#endif

// Owns what a kernel needs while it runs. Its scratch returns to torch's allocator afterwards, which orders a reuse
// behind this op's work on the same stream.
class Run {
 public:
#if defined(NF_CUDA) && !defined(NF_EMULATED)
  explicit Run(const Tensor& like) : like_(like), guard_(like.get_device_index()) {}
#else
  explicit Run(const Tensor& like) : like_(like) {}
#endif
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  Launch launch() {
    Launch on;
#ifdef NF_CUDA
    on.stream = current_stream(like_.get_device_index());
    on.multiprocessors = multiprocessors(like_.get_device_index());
#else
    on.parallel = run_parallel;
#endif
    on.allocate = [](void* self, int64_t bytes) {
      auto* run = static_cast<Run*>(self);
      run->scratch_.push_back(torch::stable::new_empty(run->like_, {bytes}, ScalarType::Byte));
      return run->scratch_.back().mutable_data_ptr();
    };
    on.owner = this;
    return on;
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> scratch_;
#if defined(NF_CUDA) && !defined(NF_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;  // launches go to the current device
#endif
};

}  // namespace nf
