// Stands in for CUDA's header of the same name, so that a C++ compiler can build csrc/cuda for the
// CPU.
//
// The threads of a block are fibers. Each runs until it reaches a barrier or a collective of its
// warp; then the next one runs. The order is shuffled in every round (the seed: EMULATION_SEED), so
// that a missing barrier shows up as a result that depends on the order. Threads that wait for each
// other forever, and collectives that only part of a warp reaches, end the process with a message.
//
// This cannot reveal: speed, misaligned memory accesses, races between two barriers that need a
// finer interleaving than whole threads, or what nvcc makes of the code. For all but speed there is
// tests/ptx_interpreter, which gets the launches of the same host code.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using std::max;
using std::min;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool is_done = false;
};

// A meeting of threads: each brings a value, and continues once all have arrived.
struct Meeting {
  int num_members = 0;
  int num_here = 0;
  unsigned generation = 0;
  const void* caller = nullptr;
  uint64_t values[2][1024];  // of this meeting and the one before, by member
};

inline struct Machine {
  dim3 block_index, thread_index, grid_size, block_size;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int current = 0;
  uint64_t num_events = 0;  // grows whenever a thread makes progress
  Meeting block;
  std::vector<Meeting> warps;
  std::minstd_rand random;
  std::function<void()> body;
} machine;

// If there is one, it gets the launches in place of the emulation.
using Launcher = void (*)(const void* kernel, unsigned num_blocks, unsigned num_threads,
                          const void* argument, size_t num_bytes);
inline Launcher launcher = nullptr;

inline void run_thread() {
  machine.body();
  machine.fibers[machine.current].is_done = true;
  ++machine.num_events;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: block %u, thread %d: %s\n", machine.block_index.x,
               machine.current, what);
  std::abort();
}

// Leaves `value` and waits; returns what all members of the meeting left.
inline const uint64_t* meet(Meeting& meeting, int member, uint64_t value, const void* caller) {
  if (meeting.num_here == 0) meeting.caller = caller;
  if (meeting.caller != caller) fail("meets threads that stand at another collective or barrier");
  const unsigned generation = meeting.generation;
  uint64_t* values = meeting.values[generation % 2];
  values[member] = value;
  ++machine.num_events;
  if (++meeting.num_here == meeting.num_members) {
    meeting.num_here = 0;
    ++meeting.generation;
  }
  while (meeting.generation == generation) {
    swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
  }
  return values;
}

inline void prepare(Fiber& fiber) {
  fiber.is_done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = &machine.scheduler;
  makecontext(&fiber.context, run_thread, 0);
}

inline void run_block() {
  const int count = static_cast<int>(machine.block_size.x);
  machine.block.num_members = count;
  machine.warps.assign((count + kWarp - 1) / kWarp, Meeting());
  for (int t = 0; t < count; ++t) ++machine.warps[t / kWarp].num_members;
  machine.fibers.resize(std::max<size_t>(machine.fibers.size(), count));
  std::vector<int> order(count);
  for (int t = 0; t < count; ++t) {
    order[t] = t;
    prepare(machine.fibers[t]);
  }
  for (bool is_running = true; is_running;) {
    const uint64_t num_events = machine.num_events;
    std::shuffle(order.begin(), order.end(), machine.random);
    is_running = false;
    for (int t : order) {
      if (machine.fibers[t].is_done) continue;
      is_running = true;
      machine.current = t;
      machine.thread_index.x = t;
      swapcontext(&machine.scheduler, &machine.fibers[t].context);
    }
    if (is_running && machine.num_events == num_events) fail("waits for threads that never come");
  }
}

// The values of the caller's warp. `caller` identifies the collective in the program.
inline const uint64_t* meet_warp(unsigned mask, uint64_t value, const void* caller) {
  if (mask != 0xffffffffu) fail("calls a collective with a part of its warp");
  const int thread = machine.current;
  return meet(machine.warps[thread / kWarp], thread % kWarp, value, caller);
}

template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T value_of(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

#define blockIdx emulation::machine.block_index
#define threadIdx emulation::machine.thread_index

// A lambda's static variable has a different address at each use of the macro.
#define EMULATED_HERE    \
  ([]() -> const void* { \
    static char here;    \
    return &here;        \
  }())
#define __syncthreads() \
  static_cast<void>(    \
      emulation::meet(emulation::machine.block, emulation::machine.current, 0, EMULATED_HERE))
#define __syncwarp() static_cast<void>(emulation::meet_warp(0xffffffffu, 0, EMULATED_HERE))

template <class T>
T emulated_shuffle(unsigned mask, T value, int source, const void* caller) {
  const uint64_t* values = emulation::meet_warp(mask, emulation::bits_of(value), caller);
  return source < 0 ? value : emulation::value_of<T>(values[source]);
}
#define EMULATED_LANE static_cast<int>(threadIdx.x % 32)
#define __shfl_xor_sync(mask, value, other) \
  emulated_shuffle(mask, value, EMULATED_LANE ^ (other), EMULATED_HERE)
#define __shfl_up_sync(mask, value, distance) \
  emulated_shuffle(mask, value, EMULATED_LANE - (distance), EMULATED_HERE)

template <class Combine>
uint32_t emulated_reduce(unsigned mask, uint32_t value, const void* caller, Combine combine) {
  const uint64_t* values = emulation::meet_warp(mask, value, caller);
  uint32_t result = static_cast<uint32_t>(values[0]);
  for (int i = 1; i < emulation::kWarp; ++i) {
    result = combine(result, static_cast<uint32_t>(values[i]));
  }
  return result;
}
#define __reduce_add_sync(mask, value) \
  emulated_reduce(mask, value, EMULATED_HERE, [](uint32_t a, uint32_t b) { return a + b; })
#define __reduce_min_sync(mask, value) \
  emulated_reduce(mask, value, EMULATED_HERE, [](uint32_t a, uint32_t b) { return std::min(a, b); })
#define __reduce_max_sync(mask, value) \
  emulated_reduce(mask, value, EMULATED_HERE, [](uint32_t a, uint32_t b) { return std::max(a, b); })
#define __shfl_sync(mask, value, source) emulated_shuffle(mask, value, source, EMULATED_HERE)
#define __ballot_sync(mask, predicate) emulated_ballot(mask, predicate, EMULATED_HERE)
inline uint32_t emulated_ballot(unsigned mask, bool predicate, const void* caller) {
  const uint64_t* values = emulation::meet_warp(mask, predicate, caller);
  uint32_t result = 0;
  for (int i = 0; i < emulation::kWarp; ++i) result |= static_cast<uint32_t>(values[i]) << i;
  return result;
}

using std::fmaf;
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((uint64_t{high} << 32 | low) << (shift % 32)) >> 32);
}
// Without the sign replication that the fourth bit of a selector requests.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = selector >> (4 * i) & 7;
    result |= static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (8 * byte) & 0xff) << (8 * i);
  }
  return result;
}
inline float __fmul_rz(float a, float b) {
  const double product = static_cast<double>(a) * b;  // exact
  const float rounded = static_cast<float>(product);
  return std::fabs(rounded) > std::fabs(product) ? std::nextafterf(rounded, 0.0f) : rounded;
}

template <class T>
T atomicAdd(T* target, T value) {
  return std::exchange(*target, *target + value);
}
template <class T>
T atomicOr(T* target, T value) {
  return std::exchange(*target, *target | value);
}
template <class T>
T atomicExch(T* target, T value) {
  return std::exchange(*target, value);
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument),
                               const Argument& argument) {
  using emulation::machine;
  if (emulation::launcher != nullptr) {
    emulation::launcher(reinterpret_cast<const void*>(kernel), config->gridDim.x,
                        config->blockDim.x, &argument, sizeof(argument));
    return cudaSuccess;
  }
  const char* seed = std::getenv("EMULATION_SEED");
  machine.random.seed(seed == nullptr ? 1 : std::atoi(seed));
  machine.block_size = config->blockDim;
  machine.body = [&] { kernel(argument); };
  for (unsigned b = 0; b < config->gridDim.x; ++b) {
    machine.block_index.x = b;
    emulation::run_block();
  }
  return cudaSuccess;
}
