#pragma once

// Runs the .cu files on the CPU, for tests under sanitizers. The threads of a block are fibers that change at barriers
// and shuffles only; blocks run one after another. Shared arrays live on the heap, filled with NaN for every block.

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9 };

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace mmrm::emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackSize = 1 << 16;

// Which blocks run (all if empty), and whether a block's threads run from the last to the first.
inline std::vector<unsigned> only_blocks;
inline bool reversed = false;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s\n", message);
  std::abort();
}

struct Fiber {
  enum State { ready, waiting, done } state;
  unsigned index;
  unsigned first, last;  // the threads it waits for
  bool needs_all;        // whether one of them that has returned is an error
  uint64_t value;        // offered to the other lanes
  ucontext_t context;
  void* fake_stack;
  std::unique_ptr<char[]> stack{new char[kStackSize]};
};

struct Machine {
  std::vector<Fiber> fibers;
  unsigned num_threads;
  Fiber* current;
  std::function<void()> kernel;
  std::map<int, std::unique_ptr<char[]>> shared;
  ucontext_t scheduler;
  void* fake_stack;
  const void* stack;
  size_t stack_size;
  Dim3 thread_index, block_index, block_dim, grid_dim;
  cudaError_t error;
};
inline Machine machine;

inline void run_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack, &machine.stack_size);
  machine.kernel();
  machine.current->state = Fiber::done;
  __sanitizer_start_switch_fiber(nullptr, machine.stack, machine.stack_size);
}

inline void resume(Fiber& fiber) {
  machine.current = &fiber;
  machine.thread_index.x = fiber.index;
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack.get(), kStackSize);
  swapcontext(&machine.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
}

inline void wait(unsigned first, unsigned last, bool needs_all) {
  Fiber& fiber = *machine.current;
  fiber.state = Fiber::waiting;
  fiber.first = first, fiber.last = last, fiber.needs_all = needs_all;
  __sanitizer_start_switch_fiber(&fiber.fake_stack, machine.stack, machine.stack_size);
  swapcontext(&fiber.context, &machine.scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

// Lets the threads go that wait for the same others as this one does, if all of those have come.
inline bool release(const Fiber& fiber) {
  const unsigned first = fiber.first, last = fiber.last;
  for (unsigned i = first; i < last; ++i) {
    const Fiber& other = machine.fibers[i];
    if (other.state == Fiber::done && fiber.needs_all) fail("a lane of a shuffle has returned");
    if (other.state == Fiber::ready) return false;
    if (other.state == Fiber::waiting && (other.first != first || other.last != last)) return false;
  }
  for (unsigned i = first; i < last; ++i) {
    if (machine.fibers[i].state == Fiber::waiting) machine.fibers[i].state = Fiber::ready;
  }
  return true;
}

inline void start(Fiber& fiber, unsigned index) {
  fiber.index = index;
  fiber.state = Fiber::ready;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackSize;
  fiber.context.uc_link = &machine.scheduler;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void run_block() {
  const unsigned count = machine.num_threads;
  for (unsigned i = 0; i < count; ++i) start(machine.fibers[i], i);
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = machine.fibers[reversed ? count - 1 - i : i];
      if (fiber.state == Fiber::ready) resume(fiber), progress = true;
    }
    for (unsigned i = 0; i < count; ++i) {
      if (machine.fibers[i].state == Fiber::waiting) progress |= release(machine.fibers[i]);
    }
  }
  for (unsigned i = 0; i < count; ++i) {
    if (machine.fibers[i].state != Fiber::done) fail("threads wait at different barriers");
  }
  machine.shared.clear();
}

inline void launch(unsigned num_blocks, unsigned num_threads, std::function<void()> kernel) {
  const bool is_valid = num_blocks > 0 && num_blocks <= 0x7fffffff && num_threads > 0 && num_threads <= 1024;
  machine.error = is_valid ? cudaSuccess : cudaErrorInvalidConfiguration;
  if (machine.error != cudaSuccess) return;
  machine.kernel = std::move(kernel);
  machine.grid_dim.x = num_blocks;
  machine.block_dim.x = machine.num_threads = num_threads;
  if (machine.fibers.size() < num_threads) machine.fibers.resize(num_threads);
  const size_t count = only_blocks.empty() ? num_blocks : only_blocks.size();
  for (size_t i = 0; i < count; ++i) {
    machine.block_index.x = only_blocks.empty() ? unsigned(i) : only_blocks[i];
    if (machine.block_index.x < num_blocks) run_block();
  }
}

template <typename T>
T* shared(size_t size, int line) {
  std::unique_ptr<char[]>& memory = machine.shared[line];
  if (!memory) {
    memory.reset(new char[size * sizeof(T)]);
    std::memset(memory.get(), 0xff, size * sizeof(T));
  }
  return reinterpret_cast<T*>(memory.get());
}

// The value of another lane; one's own where that lane is outside the group of `width`.
template <typename T>
T shuffle(T value, unsigned lane, unsigned group, unsigned width) {
  const unsigned first = machine.current->index / kWarpSize * kWarpSize;
  const unsigned last = first + kWarpSize < machine.num_threads ? first + kWarpSize : machine.num_threads;
  std::memcpy(&machine.current->value, &value, sizeof(T));
  wait(first, last, true);
  if (lane / width == group && first + lane < last) std::memcpy(&value, &machine.fibers[first + lane].value, sizeof(T));
  wait(first, last, true);
  return value;
}

}  // namespace mmrm::emulation

#define threadIdx (mmrm::emulation::machine.thread_index)
#define blockIdx (mmrm::emulation::machine.block_index)
#define blockDim (mmrm::emulation::machine.block_dim)
#define gridDim (mmrm::emulation::machine.grid_dim)
#define MMRM_SHARED(type, name, size) type* name = mmrm::emulation::shared<type>(size, __LINE__)
#define MMRM_LAUNCH(kernel, num_blocks, num_threads, stream, ...) \
  mmrm::emulation::launch(num_blocks, num_threads, [&] { (void)stream, (kernel)(__VA_ARGS__); })

inline cudaError_t cudaGetLastError() { return mmrm::emulation::machine.error; }

inline void __syncthreads() { mmrm::emulation::wait(0, mmrm::emulation::machine.num_threads, false); }

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance, unsigned width = mmrm::emulation::kWarpSize) {
  const unsigned lane = threadIdx.x % mmrm::emulation::kWarpSize;
  return mmrm::emulation::shuffle(value, lane + distance, lane / width, width);
}

// Fibers change at barriers only.
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
