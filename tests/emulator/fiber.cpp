#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && !defined(NF_EMULATOR_UCONTEXT)
#define NF_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

#ifdef NF_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

namespace nf {
namespace emulator {

static Fiber* leaving = nullptr;  // who switched last, until the other side has noticed

#ifdef NF_OWN_SWITCH
// Pushes what a call must preserve, swaps stacks, pops. A new stack holds zeros for it and the address of a trampoline,
// which calls r13(r12).
extern "C" void nf_fiber_switch(void** save, void* restore);
extern "C" void nf_fiber_trampoline();
asm(R"(
  .text
  .type nf_fiber_switch, @function
nf_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size nf_fiber_switch, .-nf_fiber_switch
  .type nf_fiber_trampoline, @function
nf_fiber_trampoline:
  .cfi_startproc
  .cfi_undefined rip
  movq %r12, %rdi
  callq *%r13
  ud2
  .cfi_endproc
  .size nf_fiber_trampoline, .-nf_fiber_trampoline
)");
#endif

void Fiber::enter(Fiber* self) {
  self->arrived();
  self->entry_(self->argument_);
  std::abort();
}

#ifndef NF_OWN_SWITCH
static void enter_split(unsigned high, unsigned low) {
  extern void fiber_begin(Fiber*);
  fiber_begin(reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low));
}
#endif
void fiber_begin(Fiber* self) { Fiber::enter(self); }

Fiber::~Fiber() {
  if (mapping_) munmap(mapping_, mapping_bytes_);
#ifndef NF_OWN_SWITCH
  delete static_cast<ucontext_t*>(context_);
#endif
}

void Fiber::start(void (*entry)(void*), void* context) {
  if (!mapping_) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapping_bytes_ = kStackBytes + page;
    void* memory =
        mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("the emulator has no memory for its threads' stacks");
    mapping_ = static_cast<char*>(memory);
    mprotect(mapping_, page, PROT_NONE);  // an overflow stops at once
    bottom_ = mapping_ + page;
    size_ = kStackBytes;
  }
#ifdef NF_EMULATOR_ASAN
  __asan_unpoison_memory_region(bottom_, size_);
#endif
  entry_ = entry;
  argument_ = context;
  fake_stack_ = nullptr;
#ifdef NF_OWN_SWITCH
  void** top = reinterpret_cast<void**>(mapping_ + mapping_bytes_);
  *--top = nullptr;
  *--top = nullptr;  // two: the stack is aligned where the trampoline calls
  *--top = reinterpret_cast<void*>(&nf_fiber_trampoline);
  *--top = nullptr;                                // rbp
  *--top = nullptr;                                // rbx
  *--top = this;                                   // r12
  *--top = reinterpret_cast<void*>(&fiber_begin);  // r13
  *--top = nullptr;                                // r14
  *--top = nullptr;                                // r15
  context_ = top;
#else
  if (!context_) context_ = new ucontext_t;
  auto* u = static_cast<ucontext_t*>(context_);
  getcontext(u);
  u->uc_stack.ss_sp = const_cast<void*>(bottom_);
  u->uc_stack.ss_size = size_;
  u->uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(this);
  makecontext(u, reinterpret_cast<void (*)()>(&enter_split), 2, static_cast<unsigned>(uint64_t{address} >> 32),
              static_cast<unsigned>(address));
#endif
}

void Fiber::arrived() {
#ifdef NF_EMULATOR_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
  if (leaving && !leaving->mapping_) {
    leaving->bottom_ = bottom;
    leaving->size_ = size;
  }
#endif
  leaving = nullptr;
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  leaving = &from;
#ifdef NF_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#ifdef NF_OWN_SWITCH
  nf_fiber_switch(&from.context_, to.context_);
#else
  if (!from.context_) from.context_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context_), static_cast<ucontext_t*>(to.context_));
#endif
  from.arrived();
}

}  // namespace emulator
}  // namespace nf
