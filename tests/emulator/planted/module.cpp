// nfkernels_planted: the emulator's own tests. Arrays are given by their addresses.

#include <pybind11/pybind11.h>

#include "emulator_control.h"
#include "planted.h"

namespace {

template <typename T>
T* at(size_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(nfkernels_planted, m) {
  using namespace nf;
  using namespace nf::planted;
#define NF_BIND(name)                                             \
  m.def(#name, [](bool fault, size_t in, size_t out, int n) {     \
    planted::name(fault, at<const float>(in), at<float>(out), n); \
  });
  NF_PLANTED(NF_BIND)
#undef NF_BIND
  m.def("shuffles",
        [](int type, size_t in, size_t out, int threads) { shuffles(type, at<void>(in), at<void>(out), threads); });
  m.def("votes", [](size_t in, size_t out, int threads) { votes(at<const float>(in), at<float>(out), threads); });
  m.def("turns",
        [](size_t out, int64_t blocks, int threads, size_t shared) { turns(at<int>(out), blocks, threads, shared); });
  m.def("product", [](int terms, size_t a, size_t b, size_t d, int k) {
    product(terms, at<const float>(a), at<const float>(b), at<float>(d), k);
  });
  m.def("conversions", [](bool half, size_t in, size_t stored, size_t back, int n) {
    conversions(half, at<const float>(in), at<void>(stored), at<float>(back), n);
  });
  m.def("packs", [](int which, size_t in, size_t out) { packs(which, at<void>(in), at<void>(out)); });
  m.def("set_order", &emulator::set_order);
}
