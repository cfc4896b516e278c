// One launch: blocks one after another, the threads of a block as fibers that take turns until all wait or are done.

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "emulator_control.h"
#include "fiber.h"
#include "source_line.h"

nf::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace nf {
namespace emulator {
namespace {

enum class State : uint8_t { ready, at_barrier, at_collective, done };

struct Copy {
  char* to;
  const char* from;
  int bytes;
  bool valid;
};

struct Thread {
  Fiber fiber;
  State state = State::done;
  bool fresh = true;  // its fiber must be started, not resumed
  unsigned index = 0;
  const void* where = nullptr;            // what it waits at
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // not yet committed
};

struct Warp {
  int waiting = 0;
  Collective kind = Collective::sync;
  int turn = 0;       // collectives alternate between two sets of slots: a lane may reach the next one
  Slot slots[2][32];  // before another has read this one's
};

struct Run {
  Fiber host;
  std::vector<std::unique_ptr<Thread>> threads;  // as many as the largest block had
  std::vector<Warp> warps;
  std::vector<unsigned> turns;  // thread numbers in the order of their turns
  size_t cursor = 0;
  unsigned count = 0;  // threads in a block
  unsigned ready = 0, at_barrier = 0, done = 0;
  Thread* current = nullptr;
  Body body = nullptr;
  void* context = nullptr;
  const void* kernel = nullptr;
  std::string error;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  Order order;
  std::mt19937_64 random{0};
  Counters counters;
  std::map<const void*, std::pair<int, size_t>> shapes;  // of a kernel's launches: threads, most shared bytes
};

Run run_state;
std::recursive_mutex run_mutex;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;
// On both sides of shared memory; the sanitizer has its own.
#ifdef NF_EMULATOR_ASAN
constexpr size_t kGuardBytes = 0;
#else
constexpr size_t kGuardBytes = 256;
#endif

const char* name_of(Collective kind) {
  static const char* const names[] = {"sync_warp", "shuffle", "shuffle_xor", "shuffle_down", "vote", "mma_tf32"};
  return names[static_cast<int>(kind)];
}

// --- turns -----------------------------------------------------------------------------------------------------------

void deal_turns() {
  Run& r = run_state;
  r.turns.resize(r.count);
  for (unsigned i = 0; i < r.count; ++i) r.turns[i] = r.order.kind == Order::reverse ? r.count - 1 - i : i;
  if (r.order.kind == Order::random) std::shuffle(r.turns.begin(), r.turns.end(), r.random);
  r.cursor = 0;
}

void next_turn(Thread& self);

void thread_main(void*) {
  Run& r = run_state;
  for (;;) {
    Thread& self = *r.current;
    std::string error;
    try {
      r.body(r.context);
    } catch (const std::exception& e) {
      error = e.what();
    } catch (...) {
      error = "an exception of unknown type";
    }
    if (!error.empty()) {
      if (r.error.empty()) r.error = error;
      Fiber::switch_to(self.fiber, r.host);  // never comes back: the launch is over
    }
    self.state = State::done;
    self.groups.clear();
    self.open.clear();
    ++r.done;
    --r.ready;
    next_turn(self);
  }
}

// Gives up the turn. Comes back when `self` is ready and chosen again.
void next_turn(Thread& self) {
  Run& r = run_state;
  Thread* next = nullptr;
  if (r.ready) {
    for (;;) {
      next = r.threads[r.turns[r.cursor]].get();
      r.cursor = r.cursor + 1 == r.count ? 0 : r.cursor + 1;
      if (next->state == State::ready) break;
    }
  }
  if (next == &self) return;
  r.current = next;
  if (next) {
    threadIdx.x = next->index;
    if (next->fresh) {
      next->fresh = false;
      next->fiber.start(thread_main, nullptr);
    }
  }
  Fiber::switch_to(self.fiber, next ? next->fiber : r.host);
  r.current = &self;
}

// --- what went wrong -------------------------------------------------------------------------------------------------

std::string describe_stuck() {
  const Run& r = run_state;
  std::string text = "its threads wait for each other for ever:";
  std::vector<bool> told(r.count, false);
  for (unsigned i = 0; i < r.count; ++i) {
    if (told[i]) continue;
    const Thread& first = *r.threads[i];
    unsigned same = 0;
    std::string numbers;
    for (unsigned j = i; j < r.count; ++j) {
      const Thread& t = *r.threads[j];
      const bool alike = t.state == first.state && (t.state == State::done || t.where == first.where);
      if (!alike || told[j]) continue;
      told[j] = true;
      if (same < 4) numbers += (same ? ", " : "") + std::to_string(j);
      if (same == 4) numbers += ", ...";
      ++same;
    }
    text += (i ? "; " : " ") + std::to_string(same) + (same == 1 ? " thread (" : " threads (") + numbers + ") ";
    if (first.state == State::done)
      text += "returned";
    else if (first.state == State::at_barrier)
      text += "at sync_block, " + source_line(first.where);
    else
      text += std::string("at ") + name_of(r.warps[i / 32].kind) + ", " + source_line(first.where);
  }
  return text;
}

void abandon() {
  Run& r = run_state;
  for (auto& t : r.threads) {
    t->fresh = true;
    t->state = State::done;
    t->groups.clear();
    t->open.clear();
  }
  r.current = nullptr;
}

[[noreturn]] void end_launch(const std::string& what) {
  const Run& r = run_state;
  const std::string text = "nfkernels emulator: kernel " + function_name(r.kernel) + ", block " +
                           std::to_string(blockIdx.x) + " of " + std::to_string(gridDim.x) + ": " + what;
  abandon();
  throw std::runtime_error(text);
}

// --- shared memory ---------------------------------------------------------------------------------------------------

struct SharedMemory {
  char* memory = nullptr;
  size_t bytes;
  explicit SharedMemory(size_t n) : bytes(n) {
    void* p = nullptr;
    if (posix_memalign(&p, 16, n + 2 * kGuardBytes)) throw std::bad_alloc();
    memory = static_cast<char*>(p);
    std::memset(memory, kGuard, n + 2 * kGuardBytes);
    std::memset(memory + kGuardBytes, kPoison, n);
    run_state.shared = memory + kGuardBytes;
    run_state.shared_bytes = n;
  }
  ~SharedMemory() { std::free(memory); }
  void check_guards() const {
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (static_cast<unsigned char>(memory[kGuardBytes + bytes + i]) != kGuard)
        end_launch("something was written " + std::to_string(i) + " bytes behind the end of its " +
                   std::to_string(bytes) + " bytes of shared memory");
      if (static_cast<unsigned char>(memory[kGuardBytes - 1 - i]) != kGuard)
        end_launch("something was written " + std::to_string(i + 1) + " bytes before its shared memory");
    }
  }
};

void run_block(unsigned block) {
  Run& r = run_state;
  blockIdx.x = block;
  SharedMemory shared(r.shared_bytes);
  deal_turns();
  for (unsigned i = 0; i < r.count; ++i) r.threads[i]->state = State::ready;
  r.warps.assign((r.count + 31) / 32, Warp{});
  r.ready = r.count;
  r.at_barrier = r.done = 0;
  Thread& first = *r.threads[r.turns[0]];
  r.cursor = 1 % r.count;
  r.current = &first;
  threadIdx.x = first.index;
  if (first.fresh) {
    first.fresh = false;
    first.fiber.start(thread_main, nullptr);
  }
  Fiber::switch_to(r.host, first.fiber);
  ++r.counters.blocks;
  if (!r.error.empty()) end_launch(r.error);
  if (r.done < r.count) end_launch(describe_stuck());
  shared.check_guards();
}

}  // namespace

// --- what kernels call -----------------------------------------------------------------------------------------------

void* shared_memory() { return run_state.shared; }

void fail(const std::string& what) {
  const Run& r = run_state;
  throw std::runtime_error("thread " + std::to_string(r.current->index) + ": " + what);
}

void check_aligned(const void* address, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
  fail(std::string(what) + " of " + std::to_string(alignment) + " bytes at an address that is not a multiple of it, " +
       source_line(__builtin_return_address(0)));
}

void multiply_warp(Slot* slots);

const Slot* gather(Collective kind, const void* in, size_t bytes) {
  Run& r = run_state;
  Thread& self = *r.current;
  Warp& warp = r.warps[self.index / 32];
  const void* here = __builtin_return_address(0);
  if (self.index / 32 * 32 + 32 > r.count)
    fail(std::string(name_of(kind)) + " needs 32 lanes, but the block ends within the warp (it has " +
         std::to_string(r.count) + " threads), " + source_line(here));
  if (warp.waiting && warp.kind != kind)
    fail(std::string("is at ") + name_of(kind) + " while other lanes of its warp wait at " + name_of(warp.kind) + ", " +
         source_line(here));
  warp.kind = kind;
  Slot* slots = warp.slots[warp.turn];
  if (bytes) std::memcpy(slots[self.index % 32].bytes, in, bytes);
  if (++warp.waiting < 32) {
    self.state = State::at_collective;
    self.where = here;
    --r.ready;
    next_turn(self);
    return slots;
  }
  if (kind == Collective::mma) multiply_warp(slots);
  warp.waiting = 0;
  warp.turn ^= 1;
  const unsigned first = self.index / 32 * 32;
  for (unsigned i = first; i < first + 32; ++i) r.threads[i]->state = State::ready;
  r.ready += 31;
  return slots;
}

// --- copies ----------------------------------------------------------------------------------------------------------

void copy_issue(void* shared, const void* global, int bytes, bool valid) {
  Run& r = run_state;
  const void* here = __builtin_return_address(0);
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  const auto base = reinterpret_cast<uintptr_t>(r.shared);
  if (to < base || to + bytes > base + r.shared_bytes)
    fail("copy_async does not write into the block's " + std::to_string(r.shared_bytes) + " bytes of shared memory, " +
         source_line(here));
  if (to % bytes || (valid && from % bytes))
    fail("copy_async of " + std::to_string(bytes) + " bytes at an address that is not a multiple of it, " +
         source_line(here));
  std::memset(shared, kPoison, bytes);
  r.current->open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid});
}

void copy_close_group() {
  Thread& self = *run_state.current;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void copy_deliver(int pending) {
  auto& groups = run_state.current->groups;
  const size_t landed = groups.size() > static_cast<size_t>(pending) ? groups.size() - pending : 0;
  for (size_t i = 0; i < landed; ++i)
    for (const Copy& c : groups[i]) {
      if (c.valid)
        std::memcpy(c.to, c.from, c.bytes);
      else
        std::memset(c.to, 0, c.bytes);
    }
  groups.erase(groups.begin(), groups.begin() + landed);
}

// --- matrix product --------------------------------------------------------------------------------------------------

// What a lane brings, and what it takes: d for d + a b (device.h says where each word lies in the matrices).
struct Fragment {
  float d[4], a[4], b[2];
};

void multiply_warp(Slot* slots) {
  typedef float Row __attribute__((vector_size(32)));
  float a[16][8];
  Row b[8], d[16];
  for (int i = 0; i < 32; ++i) {
    const auto f = from_slot<Fragment>(slots[i]);
    const int g = i / 4, t = i % 4;
    for (int j = 0; j < 4; ++j) {
      a[g + 8 * (j % 2)][t + 4 * (j / 2)] = f.a[j];
      d[g + 8 * (j / 2)][2 * t + j % 2] = f.d[j];
    }
    b[t][g] = f.b[0];
    b[t + 4][g] = f.b[1];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 8; ++k) d[row] += a[row][k] * b[k];
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4;
    const float out[4] = {d[g][2 * t], d[g][2 * t + 1], d[g + 8][2 * t], d[g + 8][2 * t + 1]};
    std::memcpy(slots[i].bytes, out, sizeof out);
  }
}

void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  for (uint32_t word : {a[0], a[1], a[2], a[3], b[0], b[1]})
    if ((word & 0x1fffu) && (word & 0x7fffffffu) <= 0x7f800000u)
      fail("mma_tf32 gets an operand that was not rounded by to_tf32 (the hardware cuts its low bits off), " +
           source_line(__builtin_return_address(0)));
  Fragment mine;
  std::memcpy(mine.d, d, sizeof d);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const Slot* slots = gather(Collective::mma, &mine, sizeof mine);
  std::memcpy(d, slots[threadIdx.x % 32].bytes, sizeof d);
}

// --- one launch ------------------------------------------------------------------------------------------------------

void run(const void* kernel, int64_t blocks, int threads, size_t shared_bytes, Body body, void* context) {
  std::lock_guard<std::recursive_mutex> lock(run_mutex);
  Run& r = run_state;
  if (r.current) throw std::runtime_error("nfkernels emulator: a kernel was launched from within a kernel");
  r.kernel = kernel;
  r.body = body;
  r.context = context;
  r.error.clear();
  r.count = static_cast<unsigned>(threads);
  r.shared_bytes = shared_bytes;
  blockDim.x = r.count;
  gridDim.x = static_cast<unsigned>(blocks);
  while (r.threads.size() < r.count) {
    r.threads.push_back(std::make_unique<Thread>());
    r.threads.back()->index = static_cast<unsigned>(r.threads.size() - 1);
  }
  ++r.counters.launches;
  auto& shape = r.shapes[kernel];
  shape = {threads, std::max(shape.second, shared_bytes)};
  std::vector<unsigned> turns;
  if (r.order.kind == Order::random) {
    turns.resize(blocks);
    for (int64_t i = 0; i < blocks; ++i) turns[i] = static_cast<unsigned>(i);
    std::shuffle(turns.begin(), turns.end(), r.random);
  }
  for (int64_t i = 0; i < blocks; ++i)
    run_block(!turns.empty()                   ? turns[i]
              : r.order.kind == Order::reverse ? static_cast<unsigned>(blocks - 1 - i)
                                               : static_cast<unsigned>(i));
  r.current = nullptr;
}

void set_order(const std::string& name, uint64_t seed) {
  Run& r = run_state;
  if (name == "forward")
    r.order.kind = Order::forward;
  else if (name == "reverse")
    r.order.kind = Order::reverse;
  else if (name == "random")
    r.order.kind = Order::random;
  else
    throw std::invalid_argument("unknown thread order '" + name + "': forward, reverse or random");
  r.order.seed = seed;
  r.random.seed(seed);
}

Counters& counters() { return run_state.counters; }

std::vector<Shape> shapes() {
  std::vector<Shape> found;
  for (const auto& [kernel, shape] : run_state.shapes)
    found.push_back({function_name(kernel), shape.first, shape.second});
  return found;
}

}  // namespace emulator

void sync_block() {
  using namespace emulator;
  Run& r = run_state;
  Thread& self = *r.current;
  self.state = State::at_barrier;
  self.where = __builtin_return_address(0);
  --r.ready;
  if (++r.at_barrier == r.count) {
    for (unsigned i = 0; i < r.count; ++i) r.threads[i]->state = State::ready;
    r.ready = r.count;
    r.at_barrier = 0;
    ++r.counters.barriers;
    deal_turns();
  }
  next_turn(self);
}

}  // namespace nf
