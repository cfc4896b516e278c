// nfkernels_emulated: the CUDA kernels with their torch bindings, run by the emulator, in the place of nfkernels._C.

#include <pybind11/pybind11.h>

#include "../../csrc/bindings/register.h"
#include "emulator_control.h"

namespace nf {

static int multiprocessor_count = 3;  // few: persistent blocks take several turns

void* current_stream(int) { return nullptr; }
int multiprocessors(int) { return multiprocessor_count; }

}  // namespace nf

PYBIND11_MODULE(nfkernels_emulated, m) {
  using namespace nf;
  m.attr("schema_version") = NF_SCHEMA_VERSION;
  m.def("register", [] { register_ops("CPU"); }, "Registers the CUDA kernels for CPU tensors.");
  m.def("isa", [] { return "cuda-emulator"; });
  m.def("set_order", &emulator::set_order, "forward, reverse or random, with a seed: whose turn comes first.",
        pybind11::arg("name"), pybind11::arg("seed") = 0);
  m.def(
      "set_multiprocessors", [](int n) { multiprocessor_count = n; }, "How many multiprocessors kernels are told of.");
  m.def("counters", [] {
    const auto& c = emulator::counters();
    pybind11::dict d;
    d["launches"] = c.launches;
    d["blocks"] = c.blocks;
    d["barriers"] = c.barriers;
    return d;
  });
  m.def(
      "shapes",
      [] {
        pybind11::list found;
        for (const auto& s : emulator::shapes())
          found.append(pybind11::make_tuple(s.kernel, s.threads, s.shared_bytes));
        return found;
      },
      "(name, threads, most bytes of shared memory) of every kernel launched so far.");
}
