// The parts of CUDA that the kernels use, on the host: a launch runs every thread of every block as a fiber, and switches fibers
// where threads wait for each other. Between two waits a thread runs alone, and the next thread is drawn from a seed: code that
// misses a barrier reads unwritten memory in some order.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulator {

struct Index {
  unsigned x;
};

// A barrier of `expected` threads; `round` distinguishes arrivals before and after the last time it opened.
struct Meeting {
  unsigned expected = 0, arrived = 0, round = 0;
};

struct Warp {
  Meeting meeting;
  double values[2][32];  // by parity of the round: an exchange ends before the one after the next begins
};

struct Block {
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<char> shared;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index block, thread;
  Block* of;
  const Meeting* waits_for = nullptr;
  unsigned round = 0;
  bool done = false;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline Index grid;
inline Meeting whole_grid;
inline const std::function<void()>* body;

inline void meet(Meeting& meeting) {
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  current->waits_for = &meeting;
  current->round = meeting.round;
  swapcontext(&current->context, &scheduler);
}

inline Warp& warp() { return current->of->warps[current->thread.x / 32]; }

template <class V>
V exchange(V value, int offset) {
  static_assert(sizeof(V) <= sizeof(double));
  Warp& of = warp();
  double* values = of.values[of.meeting.round % 2];
  const unsigned lane = current->thread.x % 32;
  std::memcpy(&values[lane], &value, sizeof(V));
  meet(of.meeting);
  std::memcpy(&value, &values[lane ^ offset], sizeof(V));
  return value;
}

inline void run_fiber() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// Runs `kernel` on a grid. Shared memory begins as NaN.
inline void launch(unsigned blocks, unsigned threads, int64_t shared_bytes, unsigned seed, const std::function<void()>& kernel) {
  constexpr size_t kStack = 64 * 1024;
  std::mt19937 random(seed);
  std::vector<Block> all(blocks);
  std::vector<std::unique_ptr<Fiber>> fibers;
  grid = {blocks};
  whole_grid = {blocks * threads};
  body = &kernel;
  for (unsigned b = 0; b < blocks; ++b) {
    all[b].meeting.expected = threads;
    all[b].warps.resize(threads / 32);
    for (Warp& of : all[b].warps) of.meeting.expected = 32;
    all[b].shared.assign(shared_bytes, char(0xff));
    for (unsigned t = 0; t < threads; ++t) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      fiber.block = {b};
      fiber.thread = {t};
      fiber.of = &all[b];
      fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, run_fiber, 0);
    }
  }
  while (!fibers.empty()) {
    bool progress = false;
    std::shuffle(fibers.begin(), fibers.end(), random);
    for (auto& fiber : fibers) {
      if (fiber->waits_for && fiber->waits_for->round == fiber->round) continue;
      fiber->waits_for = nullptr;
      current = fiber.get();
      swapcontext(&scheduler, &fiber->context);
      progress = true;
    }
    if (!progress) std::abort();  // deadlock: some threads wait for others that took another branch
    std::erase_if(fibers, [](const auto& fiber) { return fiber->done; });
  }
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define gridDim (emulator::grid)

template <class V>
V __shfl_xor_sync(unsigned, V value, int offset) {
  return emulator::exchange(value, offset);
}
inline void __syncwarp() { emulator::meet(emulator::warp().meeting); }
inline void __syncthreads() { emulator::meet(emulator::current->of->meeting); }

namespace iprm::device {
inline void* shared_memory() { return emulator::current->of->shared.data(); }
inline void grid_sync() { emulator::meet(emulator::whole_grid); }
}  // namespace iprm::device

// 16-bit types: stored in 16 bits, computed in float.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = value != value ? 0x7fc0 : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};
using __half = _Float16;
