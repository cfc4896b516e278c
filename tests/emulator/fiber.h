// A stack of its own and a way to switch to it.
#pragma once

#include <cstddef>

namespace nf {
namespace emulator {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Gives the fiber a stack (once) and makes the next switch to it call entry(context), which must not return. What an
  // earlier entry left on the stack is forgotten, not unwound.
  void start(void (*entry)(void*), void* context);

  // Stops running `from`, the fiber that calls this, and goes on in `to`.
  static void switch_to(Fiber& from, Fiber& to);

 private:
  static void enter(Fiber* self);
  friend void fiber_begin(Fiber*);

  void arrived();

  void* context_ = nullptr;  // what a switch restores: a stack pointer, or a ucontext_t
  char* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  const void* bottom_ = nullptr;  // of the stack; of the host thread's, where there is no mapping
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace emulator
}  // namespace nf
