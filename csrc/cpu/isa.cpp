// Chooses, once, which compiled copy of the kernels runs.

#include <cstdlib>
#include <cstring>

#include "../include/cpu_kernels.h"
#include "processor.h"

namespace nf {

#define NF_DECLARE(ISA)                                          \
  namespace ISA {                                                \
  NF_KERNELS(NF_DECLARE_KERNEL)                                  \
  NF_CPU_KERNELS(NF_DECLARE_KERNEL)                              \
  void elementary(int, const float*, float*, int64_t);           \
  static const Kernels table = {NF_KERNELS(NF_ENTRY)};           \
  static const CpuKernels cpu_only = {NF_CPU_KERNELS(NF_ENTRY)}; \
  }                                                              \
  static const Processor processor_##ISA = {#ISA, ISA::elementary, ISA::table};
#define NF_ENTRY(name, ...) name,

NF_DECLARE(baseline)
#ifdef NF_HAVE_X86_SETS
NF_DECLARE(avx2)
NF_DECLARE(avx512)
#endif

static const Processor* choose() {
#ifdef NF_HAVE_X86_SETS
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  // NFKERNELS_CPU_ISA lowers the choice (tests, comparisons); it cannot raise it above what the processor has.
  const char* wanted = std::getenv("NFKERNELS_CPU_ISA");
  const int limit = !wanted ? 2 : std::strcmp(wanted, "baseline") == 0 ? 0 : std::strcmp(wanted, "avx2") == 0 ? 1 : 2;
  if (has_avx512 && limit >= 2) return &processor_avx512;
  if (has_avx2 && limit >= 1) return &processor_avx2;
#endif
  return &processor_baseline;
}

const Processor& processor() {
  static const Processor* const chosen = choose();
  return *chosen;
}

const Kernels& kernels() { return processor().kernels; }

const CpuKernels& cpu_kernels() {
#ifdef NF_HAVE_X86_SETS
  if (&processor() == &processor_avx512) return avx512::cpu_only;
  if (&processor() == &processor_avx2) return avx2::cpu_only;
#endif
  return baseline::cpu_only;
}

}  // namespace nf
