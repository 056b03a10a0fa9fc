// Runs CUDA kernels on the CPU: a stand-in for the CUDA runtime header, so that the very same .cu
// source builds with g++ and can be tested, debugged and sanitised on a machine without a GPU.
//
//   g++ -std=c++17 -ffp-contract=off -Wno-unknown-pragmas -x c++ kernels.cu ...
//
// How it runs: blocks run one after another; inside a block every CUDA thread is a coroutine
// (a ucontext fiber) that runs until it has to wait for others. A thread that never waits runs to
// its end on a stack it shares with the next such thread, so code without barriers costs no
// switches.
//
// What it checks, and reports as cuda_host::Error thrown out of DHCL_LAUNCH:
//   - a barrier or warp operation that can never complete, and a __syncthreads() that a block's
//     threads reach at different source lines: the message says where how many threads wait;
//   - a lane outside its own mask, a bad shuffle width, an impossible launch configuration;
//   - DHCL_DEVICE_ASSERT, assert and __trap(). Other C++ exceptions pass through as they are.
// Reads of what CUDA leaves undefined give the byte 0xCD: dynamic shared memory that the block has
// not written yet, and a shuffle from a lane that has exited or is not in the mask. Dynamic shared
// memory is a heap block of exactly the size asked for, so AddressSanitizer sees every overrun.
//
// Environment (read at every launch):
//   DHCL_HOST_SCHEDULE  forward (default), reverse, shuffle or shuffle:SEED. The order in which
//                       threads and blocks take their turns; a result that depends on it is a race.
//   DHCL_HOST_ABORT     1: print the first error and abort where it happens, for a debugger.
//
// What it does not do: blocks do not overlap and threads switch only where they wait, so results
// show no race that needs true concurrency (race.h finds those, in a build of its own), and a
// thread that spins on a flag hangs unless it calls __nanosleep(). Static __shared__ variables are
// function-local statics: they are not reset between blocks. nvcc fuses a*b+c by default, this does
// not; where bits matter, kernels must use __fmul_rn and its kin, or __fmaf_rn, which mean the same
// on both sides.
#pragma once

#ifdef __CUDACC__
#error "cuda_host.h replaces the CUDA runtime; nvcc must include the real one."
#endif
#ifdef __FAST_MATH__
#error "cuda_host.h needs IEEE arithmetic: build without -ffast-math."
#endif

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "race.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// ------------------------------------------------------------------------------------------------
// Language keywords
// ------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
// Empty, because libstdc++ spells its own attribute __attribute__((__noinline__)).
#define __noinline__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one at a time, so one copy serves them all.
#define __shared__ static
// __restrict__ is g++'s own keyword already.

// ------------------------------------------------------------------------------------------------
// Vector types: the sizes and alignments of vector_types.h
// ------------------------------------------------------------------------------------------------

#define CUDA_HOST_VECTOR_TYPES(name, type)                                                    \
  struct alignas(sizeof(type)) name##1 { type x; };                                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(sizeof(type)) name##3 { type x, y, z; };                                     \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##1 make_##name##1(type x) { return {x}; }                                       \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }      \
  static_assert(sizeof(name##3) == 3 * sizeof(type) && sizeof(name##4) == 4 * sizeof(type), "")

CUDA_HOST_VECTOR_TYPES(char, signed char);
CUDA_HOST_VECTOR_TYPES(uchar, unsigned char);
CUDA_HOST_VECTOR_TYPES(short, short);
CUDA_HOST_VECTOR_TYPES(ushort, unsigned short);
CUDA_HOST_VECTOR_TYPES(int, int);
CUDA_HOST_VECTOR_TYPES(uint, unsigned);
CUDA_HOST_VECTOR_TYPES(long, long);
CUDA_HOST_VECTOR_TYPES(ulong, unsigned long);
CUDA_HOST_VECTOR_TYPES(longlong, long long);
CUDA_HOST_VECTOR_TYPES(ulonglong, unsigned long long);
CUDA_HOST_VECTOR_TYPES(float, float);
CUDA_HOST_VECTOR_TYPES(double, double);
#undef CUDA_HOST_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return uint3{x, y, z}; }
};

// ------------------------------------------------------------------------------------------------
// Errors
// ------------------------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
using cudaError_t = cudaError;

namespace cuda_host {

/// What a launch throws when the kernel, or the launch itself, is wrong.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// printf into a std::string.
__attribute__((format(printf, 1, 2))) inline std::string format(const char* fmt, ...) {
  va_list args, again;
  va_start(args, fmt);
  va_copy(again, args);
  std::string text(static_cast<size_t>(std::vsnprintf(nullptr, 0, fmt, args)), '\0');
  std::vsnprintf(&text[0], text.size() + 1, fmt, again);
  va_end(again);
  va_end(args);
  return text;
}

namespace detail {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned char kPoison = 0xCD;
// What a kernel may use without cudaFuncSetAttribute, and what it may use at all (sm_90).
constexpr size_t kDefaultSharedBytes = 48 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr size_t kStackBytes = 256 << 10;

inline std::string triple(const uint3& v) { return format("(%u, %u, %u)", v.x, v.y, v.z); }

inline const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

// ------------------------------------------------------------------------------------------------
// Schedule
// ------------------------------------------------------------------------------------------------

struct Schedule {
  enum Order { kForward, kReverse, kShuffle } order = kForward;
  uint64_t seed = 0;

  static Schedule parse(const std::string& text) {
    if (text.empty() || text == "forward") return {kForward, 0};
    if (text == "reverse") return {kReverse, 0};
    if (text == "shuffle") return {kShuffle, 0};
    if (text.rfind("shuffle:", 0) == 0) {
      const char* digits = text.c_str() + 8;
      char* end = nullptr;
      const uint64_t seed = std::strtoull(digits, &end, 10);
      if (*digits >= '0' && *digits <= '9' && *end == '\0') return {kShuffle, seed};
    }
    throw Error("cuda_host: unknown schedule '" + text +
                "': expected forward, reverse, shuffle or shuffle:SEED");
  }
};

/// SplitMix64: small, seedable, and the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  uint64_t below(uint64_t n) {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) % n;
  }

 private:
  uint64_t state_;
};

// ------------------------------------------------------------------------------------------------
// Fibers
// ------------------------------------------------------------------------------------------------

/// A point of execution that can be left and returned to.
struct Context {
  ucontext_t machine_context;
  // Only for AddressSanitizer, which must know on which stack the code runs.
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};

// Whom control came from, so that whoever receives it can note the stack of the one that left.
inline Context* left_context = nullptr;

inline void arrive_on(Context& here) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(here.fake_stack, &left_context->stack_bottom,
                                  &left_context->stack_size);
#else
  static_cast<void>(here);
#endif
}

inline void switch_context(Context& from, Context& to) {
  left_context = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_size);
#endif
  swapcontext(&from.machine_context, &to.machine_context);
  arrive_on(from);
}

/// A context with a stack of its own, with an unmapped page below it to stop an overflow.
class Fiber : public Context {
 public:
  explicit Fiber(void (*entry)()) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    // NORESERVE: a block may need 1024 of these, and most touch one or two pages.
    mapping_ = mmap(nullptr, page_ + kStackBytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping_, page_, PROT_NONE);
    char* bottom = static_cast<char*>(mapping_) + page_;
    stack_bottom = bottom;
    stack_size = kStackBytes;
    getcontext(&machine_context);
    machine_context.uc_stack.ss_sp = bottom;
    machine_context.uc_stack.ss_size = kStackBytes;
    machine_context.uc_link = nullptr;
    makecontext(&machine_context, entry, 0);
    // Only makecontext needs the size. AddressSanitizer's swapcontext would forget all it knows
    // about a stack whose size it reads here, and with it every overrun of a local array.
    machine_context.uc_stack.ss_size = 0;
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { munmap(mapping_, page_ + kStackBytes); }

 private:
  size_t page_;
  void* mapping_;
};

// ------------------------------------------------------------------------------------------------
// Threads, warps and what they wait for
// ------------------------------------------------------------------------------------------------

struct Thread;

/// An operation at which threads meet. Once all have come, `complete` is called once and sets every
/// participant's result; the address of a Collective is its identity.
struct Collective {
  const char* name;
  void (*complete)(Thread* threads, uint32_t members);
  bool block_wide = false;
  bool orders_memory = block_wide;
};

struct Thread {
  uint3 index;
  unsigned linear = 0;
  // The fiber that holds this thread's frames; null before it starts and after it ends.
  Fiber* fiber = nullptr;
  bool done = false;

  // What it waits for; null while it can run.
  const Collective* at = nullptr;
  uint32_t mask = 0;
  const char* file = nullptr;
  int line = 0;

  // What it brought, and what it is given.
  uint64_t value = 0;
  unsigned source_lane = 0;
  uint64_t result = 0;
};

struct Warp {
  uint32_t live = 0;     // lanes that exist and have not exited
  uint32_t waiting = 0;  // lanes at a warp-wide operation
};

/// Unwinds a waiting thread after another one has failed.
struct Cancelled {};

struct LaunchConfig {
  const char* kernel_name;
  const void* kernel;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
};

// The built-in variables of the running thread.
inline uint3 thread_index{0, 0, 0};
inline uint3 block_index{0, 0, 0};
inline dim3 block_size;
inline dim3 grid_size;

/// The one emulated device. Launches from several host threads take turns.
class Machine {
 public:
  /// Runs `call(context)` once for every thread of the grid.
  void launch(const LaunchConfig& config, void (*call)(const void*), const void* context) {
    if (owner_.load() == std::this_thread::get_id())
      throw Error("cuda_host: a kernel cannot launch a kernel");
    const std::lock_guard<std::mutex> lock(mutex_);
    check(config);
    schedule_ = Schedule::parse(schedule_text());
    random_ = Random(schedule_.seed);
    const char* abort_variable = std::getenv("DHCL_HOST_ABORT");
    abort_on_error_ = abort_variable != nullptr && std::strcmp(abort_variable, "1") == 0;

    // Released, and the thread variables cleared, however this function is left.
    struct Scope {
      Machine& machine;
      ~Scope() {
        race::end_launch();
        machine.shared_.reset();
        machine.current_ = nullptr;
        machine.owner_ = std::thread::id();
      }
    } scope{*this};
    owner_ = std::this_thread::get_id();
    config_ = &config;
    call_ = call;
    call_context_ = context;
    grid_size = config.grid;
    block_size = config.block;
    shared_.reset(new unsigned char[config.shared_bytes]);
    set_up_threads();
    race::begin_launch(static_cast<unsigned>(threads_.size()), shared_.get(), config.shared_bytes);
    // Of static storage, as __shared__ memory is.
    race::exempt(this, sizeof(*this));
    race::exempt(&thread_index, sizeof(thread_index));
    race::exempt(&block_index, sizeof(block_index));
    race::exempt(&block_size, sizeof(block_size));
    race::exempt(&grid_size, sizeof(grid_size));

    const uint64_t blocks = uint64_t{config.grid.x} * config.grid.y * config.grid.z;
    std::vector<uint64_t> shuffled;
    if (schedule_.order == Schedule::kShuffle) {
      shuffled.resize(blocks);
      std::iota(shuffled.begin(), shuffled.end(), uint64_t{0});
      for (uint64_t i = blocks; i > 1; --i) std::swap(shuffled[i - 1], shuffled[random_.below(i)]);
    }
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = schedule_.order == Schedule::kForward   ? i
                         : schedule_.order == Schedule::kReverse ? blocks - 1 - i
                                                                 : shuffled[i];
      block_index = {static_cast<unsigned>(b % config.grid.x),
                     static_cast<unsigned>(b / config.grid.x % config.grid.y),
                     static_cast<unsigned>(b / config.grid.x / config.grid.y)};
      race::begin_block(b);
      run_block();
    }
    const std::string races = race::end_launch();
    if (!races.empty())
      throw Error(
          format("cuda_host: data race in kernel %s:%s", config.kernel_name, races.c_str()));
  }

  /// Waits until all live threads of the block have come here.
  uint64_t meet_block(const Collective& collective, uint64_t value, const char* file, int line) {
    const race::Watch off(false);
    Thread& self = arrive(collective, ~0u, value, 0, file, line);
    ++block_waiting_;
    release_block_if_complete();
    suspend();
    return self.result;
  }

  /// Waits until all live lanes in `mask` have come here with the same mask.
  uint64_t meet_warp(const Collective& collective, uint32_t mask, uint64_t value,
                     unsigned source_lane, const char* file, int line) {
    const race::Watch off(false);
    Thread& self = arrive(collective, mask, value, source_lane, file, line);
    warps_[self.linear / kWarpLanes].waiting |= 1u << lane();
    release_warp_if_complete(self.linear / kWarpLanes, mask);
    suspend();
    return self.result;
  }

  /// Lets every other runnable thread of the block run first.
  void yield() {
    const race::Watch off(false);
    if (current_ == nullptr) return;
    push_ready(*current_);
    suspend();
  }

  [[noreturn]] void fail_here(const std::string& what, const char* file, int line) {
    const race::Watch off(false);
    throw Error(format("%s [%s, %s:%d]", what.c_str(), where().c_str(), base_name(file), line));
  }

  bool in_kernel() const { return owner_.load() == std::this_thread::get_id() && current_; }
  unsigned lane() const {
    const race::Watch off(false);
    return current_ == nullptr ? 0 : current_->linear % kWarpLanes;
  }
  uint32_t live_lanes() const {
    const race::Watch off(false);
    return current_ == nullptr ? 1u : warps_[current_->linear / kWarpLanes].live;
  }
  void* shared() const {
    const race::Watch off(false);
    return shared_.get();
  }

  void set_schedule(const std::string& text) {
    Schedule::parse(text);  // complain here, not at the next launch
    const std::lock_guard<std::mutex> lock(mutex_);
    schedule_override_ = text;
  }
  void set_shared_limit(const void* kernel, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shared_limits_[kernel] = bytes;
  }

 private:
  std::string schedule_text() const {
    if (!schedule_override_.empty()) return schedule_override_;
    const char* variable = std::getenv("DHCL_HOST_SCHEDULE");
    return variable == nullptr ? "" : variable;
  }

  void check(const LaunchConfig& c) const {
    const auto reject = [&c](const std::string& why) {
      throw Error(format("cuda_host: %s: invalid configuration argument: ", c.kernel_name) + why);
    };
    const uint64_t threads = uint64_t{c.block.x} * c.block.y * c.block.z;
    if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0) reject("empty grid " + triple(c.grid));
    if (c.grid.x > 0x7fffffffu || c.grid.y > 65535 || c.grid.z > 65535)
      reject("grid " + triple(c.grid) + " exceeds (2147483647, 65535, 65535)");
    if (c.block.x == 0 || c.block.y == 0 || c.block.z == 0)
      reject("empty block " + triple(c.block));
    if (c.block.x > 1024 || c.block.y > 1024 || c.block.z > 64 || threads > 1024)
      reject("block " + triple(c.block) + " exceeds 1024 threads or (1024, 1024, 64)");
    if (c.shared_bytes > kMaxSharedBytes)
      reject(
          format("%zu bytes of dynamic shared memory exceed %zu", c.shared_bytes, kMaxSharedBytes));
    const auto limit = shared_limits_.find(c.kernel);
    const size_t allowed = limit == shared_limits_.end() ? kDefaultSharedBytes : limit->second;
    if (c.shared_bytes > allowed)
      reject(
          format("%zu bytes of dynamic shared memory exceed the kernel's limit of %zu; raise it "
                 "with cudaFuncSetAttribute(cudaFuncAttributeMaxDynamicSharedMemorySize)",
                 c.shared_bytes, allowed));
  }

  std::string where() const {
    if (current_ == nullptr) return "outside any kernel";
    return format("kernel %s, block %s, thread %s", config_->kernel_name,
                  triple(block_index).c_str(), triple(current_->index).c_str());
  }

  // ---- one block ----

  void set_up_threads() {
    const dim3& b = block_size;
    threads_.assign(size_t{b.x} * b.y * b.z, Thread());
    for (unsigned t = 0; t < threads_.size(); ++t) {
      threads_[t].index = {t % b.x, t / b.x % b.y, t / (b.x * b.y)};
      threads_[t].linear = t;
    }
    warps_.assign((threads_.size() + kWarpLanes - 1) / kWarpLanes, Warp());
    ready_.assign(threads_.size(), nullptr);
  }

  void run_block() {
    std::memset(shared_.get(), kPoison, config_->shared_bytes);
    live_ = static_cast<unsigned>(threads_.size());
    block_waiting_ = 0;
    failure_ = nullptr;
    cancelling_ = false;
    ready_count_ = 0;
    for (size_t w = 0; w < warps_.size(); ++w) {
      const size_t lanes = std::min<size_t>(kWarpLanes, threads_.size() - w * kWarpLanes);
      warps_[w].live = lanes == kWarpLanes ? ~0u : (1u << lanes) - 1;
      warps_[w].waiting = 0;
    }
    for_each_thread([this](Thread& t) {
      t.done = false;
      t.at = nullptr;
      push_ready(t);
    });
    run_until_idle();
    if (live_ > 0 && failure_ == nullptr) {
      cancel(std::make_exception_ptr(Error(describe_deadlock())), nullptr);
      run_until_idle();
    }
    current_ = nullptr;
    if (failure_ != nullptr) {
      const std::exception_ptr failure = std::exchange(failure_, nullptr);
      std::rethrow_exception(failure);
    }
  }

  template <typename F>
  void for_each_thread(F f) {
    if (schedule_.order == Schedule::kReverse) {
      for (auto t = threads_.rbegin(); t != threads_.rend(); ++t) f(*t);
    } else {
      for (Thread& t : threads_) f(t);
    }
  }

  // ---- ready queue: first in, first out; or any of them in turn under kShuffle ----

  void push_ready(Thread& t) { ready_[(ready_head_ + ready_count_++) % ready_.size()] = &t; }

  Thread* pop_ready() {
    if (ready_count_ == 0) return nullptr;
    ready_head_ %= ready_.size();
    if (schedule_.order == Schedule::kShuffle)
      std::swap(ready_[ready_head_],
                ready_[(ready_head_ + random_.below(ready_count_)) % ready_.size()]);
    --ready_count_;
    return ready_[ready_head_++];
  }

  // ---- switching ----

  // From the host's own stack: runs threads until none can go on.
  void run_until_idle() {
    if (Thread* next = pop_ready()) switch_context(host_, enter(*next));
  }

  // Makes `next` the running thread; gives the context in which it runs.
  Context& enter(Thread& next) {
    current_ = &next;
    thread_index = next.index;
    if (next.fiber == nullptr) {
      if (idle_.empty()) {
        fibers_.push_back(std::make_unique<Fiber>(&Machine::fiber_main));
        idle_.push_back(fibers_.back().get());
      }
      next.fiber = idle_.back();
      idle_.pop_back();
    }
    race::run_thread(next.linear, next.fiber->stack_bottom, next.fiber->stack_size);
    return *next.fiber;
  }

  // From a thread that waits, or has put itself into the queue: runs others until its turn comes.
  void suspend() {
    Thread* self = current_;
    Fiber* fiber = self->fiber;
    Thread* next = pop_ready();
    if (next != self) switch_context(*fiber, next == nullptr ? host_ : enter(*next));
    if (cancelling_) throw Cancelled();
  }

  static void fiber_main();

  // The body of every fiber: runs threads that have not started yet, and steps aside for those that
  // wait on fibers of their own. Never returns.
  void fiber_loop() {
    Fiber* fiber = current_->fiber;
    arrive_on(*fiber);
    for (;;) {
      run_thread(*current_);
      Thread* next = pop_ready();
      idle_.push_back(fiber);
      // enter() takes the fiber that became idle last, which is this one: no switch.
      Context& target = next == nullptr ? host_ : enter(*next);
      if (&target != fiber) switch_context(*fiber, target);
    }
  }

  void run_thread(Thread& self) {
    try {
      const race::Watch on(true);
      call_(call_context_);
    } catch (const Cancelled&) {
    } catch (...) {
      if (failure_ == nullptr) cancel(std::current_exception(), &self);
    }
    self.done = true;
    self.fiber = nullptr;
    --live_;
    if (cancelling_) return;
    const unsigned w = self.linear / kWarpLanes;
    warps_[w].live &= ~(1u << (self.linear % kWarpLanes));
    // Those who waited only for this one may go on.
    for (uint32_t left = warps_[w].waiting; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (warps_[w].waiting >> lane & 1)
        release_warp_if_complete(w, threads_[w * kWarpLanes + lane].mask);
    }
    release_block_if_complete();
  }

  // Remembers the failure. From now on threads that have started are unwound, all but the one that
  // is running, and no new one starts.
  void cancel(std::exception_ptr failure, const Thread* running) {
    failure_ = std::move(failure);
    if (abort_on_error_) abort_with_failure();
    cancelling_ = true;
    ready_count_ = 0;
    for (Thread& t : threads_)
      if (t.fiber != nullptr && &t != running) push_ready(t);
  }

  [[noreturn]] void abort_with_failure() {
    try {
      std::rethrow_exception(failure_);
    } catch (const std::exception& e) {
      std::fprintf(stderr, "%s\n", e.what());
    } catch (...) {
      std::fprintf(stderr, "cuda_host: unknown exception in %s\n", where().c_str());
    }
    std::abort();
  }

  // ---- meeting points ----

  Thread& arrive(const Collective& collective, uint32_t mask, uint64_t value, unsigned source_lane,
                 const char* file, int line) {
    if (!in_kernel()) throw Error(format("cuda_host: %s outside a kernel", collective.name));
    Thread& self = *current_;
    if ((mask >> lane() & 1) == 0)
      fail_here(format("%s: lane %u is not in its own mask 0x%08x", collective.name, lane(), mask),
                file, line);
    self.at = &collective;
    self.mask = mask;
    self.value = value;
    self.source_lane = source_lane;
    self.file = file;
    self.line = line;
    return self;
  }

  void release_block_if_complete() {
    if (block_waiting_ == 0 || block_waiting_ != live_) return;
    const Thread* first = nullptr;
    for (const Thread& t : threads_) {
      if (t.done) continue;
      if (first == nullptr) first = &t;
      // CUDA leaves it undefined when threads of a block meet at different barriers.
      if (t.at != first->at || t.line != first->line || std::strcmp(t.file, first->file) != 0)
        return;
    }
    first->at->complete(threads_.data(), static_cast<uint32_t>(threads_.size()));
    race::block_barrier(first->file, first->line);
    block_waiting_ = 0;
    for_each_thread([this](Thread& t) {
      if (t.done) return;
      t.at = nullptr;
      push_ready(t);
    });
  }

  void release_warp_if_complete(unsigned w, uint32_t mask) {
    Warp& warp = warps_[w];
    const uint32_t members = mask & warp.live;
    if ((warp.waiting & members) != members) return;
    Thread* lanes = &threads_[w * kWarpLanes];
    const Thread& first = lanes[__builtin_ctz(members)];
    for (uint32_t left = members; left != 0; left &= left - 1) {
      const Thread& t = lanes[__builtin_ctz(left)];
      if (t.at != first.at || t.mask != mask) return;
    }
    first.at->complete(lanes, members);
    if (first.at->orders_memory) race::warp_barrier(w, members, first.file, first.line);
    warp.waiting &= ~members;
    for (unsigned i = 0; i < kWarpLanes; ++i) {
      const unsigned lane = schedule_.order == Schedule::kReverse ? kWarpLanes - 1 - i : i;
      if ((members >> lane & 1) == 0) continue;
      lanes[lane].at = nullptr;
      push_ready(lanes[lane]);
    }
  }

  std::string describe_deadlock() const {
    std::string text =
        format("cuda_host: divergent barrier in kernel %s, block %s: ", config_->kernel_name,
               triple(block_index).c_str());
    std::vector<bool> told(threads_.size(), false);
    for (size_t t = 0; t < threads_.size(); ++t) {
      const Thread& head = threads_[t];
      if (head.done || told[t]) continue;
      std::vector<size_t> group;
      for (size_t u = t; u < threads_.size(); ++u) {
        const Thread& other = threads_[u];
        if (other.done || other.at != head.at || other.mask != head.mask ||
            other.line != head.line || std::strcmp(other.file, head.file) != 0)
          continue;
        told[u] = true;
        group.push_back(u);
      }
      const std::string mask =
          head.at->block_wide ? std::string() : format(" with mask 0x%08x", head.mask);
      text += format("%zu of %zu threads wait at %s%s (%s:%d; threads %s); ", group.size(),
                     threads_.size(), head.at->name, mask.c_str(), base_name(head.file), head.line,
                     ranges(group).c_str());
    }
    return text + format("%zu have exited", threads_.size() - live_);
  }

  // "0-6, 9, 12-31", cut short where it would get long.
  static std::string ranges(const std::vector<size_t>& sorted) {
    std::string text;
    int count = 0;
    for (size_t i = 0; i < sorted.size(); ++count) {
      if (count == 8) return text + ", ...";
      size_t j = i;
      while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
      if (count > 0) text += ", ";
      text += i == j ? format("%zu", sorted[i]) : format("%zu-%zu", sorted[i], sorted[j]);
      i = j + 1;
    }
    return text;
  }

  std::mutex mutex_;
  std::atomic<std::thread::id> owner_{std::thread::id()};
  std::string schedule_override_;
  std::map<const void*, size_t> shared_limits_;

  // The launch.
  const LaunchConfig* config_ = nullptr;
  void (*call_)(const void*) = nullptr;
  const void* call_context_ = nullptr;
  Schedule schedule_;
  Random random_;
  bool abort_on_error_ = false;
  std::unique_ptr<unsigned char[]> shared_;

  // The block.
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  unsigned live_ = 0;
  unsigned block_waiting_ = 0;
  Thread* current_ = nullptr;
  std::vector<Thread*> ready_;  // a ring
  size_t ready_head_ = 0;
  size_t ready_count_ = 0;
  std::exception_ptr failure_;
  bool cancelling_ = false;

  // Kept between launches: their stacks are the costly part.
  Context host_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

inline Machine machine;

inline void Machine::fiber_main() { machine.fiber_loop(); }

// ------------------------------------------------------------------------------------------------
// What the meeting points compute
// ------------------------------------------------------------------------------------------------

template <typename F>
void for_each_lane(uint32_t members, F f) {
  for (; members != 0; members &= members - 1) f(static_cast<unsigned>(__builtin_ctz(members)));
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void complete_nothing(Thread*, uint32_t) {}

/// The block's counterpart: here `size` threads are given, and those that have exited are skipped.
template <typename Result>
void complete_block(Thread* threads, uint32_t size) {
  unsigned nonzero = 0, live = 0;
  for (uint32_t t = 0; t < size; ++t) {
    live += !threads[t].done;
    nonzero += !threads[t].done && threads[t].value != 0;
  }
  for (uint32_t t = 0; t < size; ++t)
    if (!threads[t].done) threads[t].result = Result()(nonzero, live);
}

struct CountNonzero {
  unsigned operator()(unsigned nonzero, unsigned) const { return nonzero; }
};
struct AllNonzero {
  unsigned operator()(unsigned nonzero, unsigned live) const { return nonzero == live; }
};
struct AnyNonzero {
  unsigned operator()(unsigned nonzero, unsigned) const { return nonzero != 0; }
};

inline void complete_shuffle(Thread* lanes, uint32_t members) {
  for_each_lane(members, [=](unsigned lane) {
    const unsigned source = lanes[lane].source_lane;
    if (members >> source & 1)
      lanes[lane].result = lanes[source].value;
    else
      std::memset(&lanes[lane].result, kPoison, sizeof(lanes[lane].result));
  });
}

inline uint32_t nonzero_lanes(const Thread* lanes, uint32_t members) {
  uint32_t set = 0;
  for_each_lane(members, [&](unsigned lane) { set |= uint32_t{lanes[lane].value != 0} << lane; });
  return set;
}

inline void give_all(Thread* lanes, uint32_t members, uint64_t result) {
  for_each_lane(members, [=](unsigned lane) { lanes[lane].result = result; });
}

inline void complete_ballot(Thread* lanes, uint32_t members) {
  give_all(lanes, members, nonzero_lanes(lanes, members));
}
inline void complete_any(Thread* lanes, uint32_t members) {
  give_all(lanes, members, nonzero_lanes(lanes, members) != 0);
}
inline void complete_all(Thread* lanes, uint32_t members) {
  give_all(lanes, members, nonzero_lanes(lanes, members) == members);
}

inline void complete_match(Thread* lanes, uint32_t members) {
  for_each_lane(members, [=](unsigned lane) {
    uint32_t same = 0;
    for_each_lane(members, [&](unsigned other) {
      same |= uint32_t{lanes[other].value == lanes[lane].value} << other;
    });
    lanes[lane].result = same;
  });
}

template <typename T, typename Combine>
void complete_reduce(Thread* lanes, uint32_t members) {
  T total = from_bits<T>(lanes[__builtin_ctz(members)].value);
  for_each_lane(members & (members - 1),
                [&](unsigned lane) { total = Combine()(total, from_bits<T>(lanes[lane].value)); });
  give_all(lanes, members, to_bits(total));
}

struct WrappingAdd {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  }
};
struct Least {
  template <typename T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Greatest {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

inline constexpr Collective kSyncThreads{"__syncthreads", complete_nothing, true};
inline constexpr Collective kSyncCount{"__syncthreads_count", complete_block<CountNonzero>, true};
inline constexpr Collective kSyncAnd{"__syncthreads_and", complete_block<AllNonzero>, true};
inline constexpr Collective kSyncOr{"__syncthreads_or", complete_block<AnyNonzero>, true};
inline constexpr Collective kSyncWarp{"__syncwarp", complete_nothing, false, true};
inline constexpr Collective kBallot{"__ballot_sync", complete_ballot};
inline constexpr Collective kAny{"__any_sync", complete_any};
inline constexpr Collective kAll{"__all_sync", complete_all};
// One per value type: lanes that shuffle different types do not meet.
template <typename T>
inline constexpr Collective kShuffle{"__shfl_sync", complete_shuffle};
template <typename T>
inline constexpr Collective kShuffleUp{"__shfl_up_sync", complete_shuffle};
template <typename T>
inline constexpr Collective kShuffleDown{"__shfl_down_sync", complete_shuffle};
template <typename T>
inline constexpr Collective kShuffleXor{"__shfl_xor_sync", complete_shuffle};
template <typename T>
inline constexpr Collective kMatchAny{"__match_any_sync", complete_match};
template <typename T>
inline constexpr Collective kMatchAll{"__match_all_sync", complete_match};
template <typename T>
inline constexpr Collective kReduceAdd{"__reduce_add_sync", complete_reduce<T, WrappingAdd>};
template <typename T>
inline constexpr Collective kReduceMin{"__reduce_min_sync", complete_reduce<T, Least>};
template <typename T>
inline constexpr Collective kReduceMax{"__reduce_max_sync", complete_reduce<T, Greatest>};
template <typename T>
inline constexpr Collective kReduceAnd{"__reduce_and_sync", complete_reduce<T, std::bit_and<T>>};
template <typename T>
inline constexpr Collective kReduceOr{"__reduce_or_sync", complete_reduce<T, std::bit_or<T>>};
template <typename T>
inline constexpr Collective kReduceXor{"__reduce_xor_sync", complete_reduce<T, std::bit_xor<T>>};

/// The lane's segment of `width` lanes.
struct Segment {
  unsigned lane, first, last;
  Segment(const char* name, int width, const char* file, int line) : lane(machine.lane()) {
    if (width < 1 || width > static_cast<int>(kWarpLanes) || (width & (width - 1)) != 0)
      machine.fail_here(
          format("%s: width must be a power of two of at most 32 (got %d)", name, width), file,
          line);
    first = lane & ~(static_cast<unsigned>(width) - 1);
    last = first + static_cast<unsigned>(width) - 1;
  }
};

}  // namespace detail

/// Overrides DHCL_HOST_SCHEDULE for all later launches; "" gives it back to the environment.
inline void set_schedule(const std::string& text) { detail::machine.set_schedule(text); }

/// True in code that a launch runs.
inline bool in_kernel() { return detail::machine.in_kernel(); }

/// Throws Error with the message and the place; what the assertion macros and __trap() call.
[[noreturn]] inline void raise(std::string what, const char* file, int line) {
  while (!what.empty() && what.back() == '\n') what.pop_back();
  detail::machine.fail_here(what, file, line);
}

/// A kernel with its launch configuration, to be called with the kernel's arguments.
template <typename... Params>
class Launcher {
  static_assert(!std::disjunction<std::is_reference<Params>...>::value,
                "A kernel parameter cannot be a reference.");

 public:
  Launcher(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes)
      : kernel_(kernel),
        config_{name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes} {}

  void operator()(Params... args) const {
    // Every thread gets its own copy of the arguments, as on the device.
    const auto call = [&] { kernel_(args...); };
    detail::machine.launch(
        config_, [](const void* closure) { (*static_cast<decltype(&call)>(closure))(); }, &call);
  }

 private:
  void (*kernel_)(Params...);
  detail::LaunchConfig config_;
};

template <typename... Params>
Launcher<Params...> launcher(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                             size_t shared_bytes, cudaStream_t) {
  return Launcher<Params...>(name, kernel, grid, block, shared_bytes);
}

}  // namespace cuda_host

// ------------------------------------------------------------------------------------------------
// Built-in variables, launches, shared memory, assertions
// ------------------------------------------------------------------------------------------------

inline const uint3& threadIdx = cuda_host::detail::thread_index;
inline const uint3& blockIdx = cuda_host::detail::block_index;
inline const dim3& blockDim = cuda_host::detail::block_size;
inline const dim3& gridDim = cuda_host::detail::grid_size;
constexpr int warpSize = 32;

/// kernel<<<grid, block, smem_bytes, stream>>>(...). Returns when the grid has run.
#define DHCL_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  ::cuda_host::launcher(#kernel, kernel, grid, block, smem_bytes, stream)(__VA_ARGS__)

/// Declares `type* name`, the block's dynamic shared memory.
#define DHCL_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::cuda_host::detail::machine.shared())

/// DHCL_DEVICE_ASSERT(condition, format, ...): the launch throws cuda_host::Error with the message.
#define DHCL_DEVICE_ASSERT(condition, ...)                                                      \
  do {                                                                                          \
    if (!(condition)) ::cuda_host::raise(::cuda_host::format(__VA_ARGS__), __FILE__, __LINE__); \
  } while (0)

namespace cuda_host {
[[noreturn]] inline void assertion_failed(const char* text, const char* file, int line,
                                          const char* function) {
  if (in_kernel()) raise(format("assertion `%s' failed", text), file, line);
  __assert_fail(text, file, static_cast<unsigned>(line), function);
}
}  // namespace cuda_host

// In a kernel a failed assert fails the launch; elsewhere it aborts as ever. (Including <cassert>
// again brings back the aborting one.)
#undef assert
#ifdef NDEBUG
#define assert(condition) static_cast<void>(0)
#else
#define assert(condition)       \
  (static_cast<bool>(condition) \
       ? static_cast<void>(0)   \
       : ::cuda_host::assertion_failed(#condition, __FILE__, __LINE__, __PRETTY_FUNCTION__))
#endif

// The caller's place, for messages.
#define CUDA_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

[[noreturn]] inline void __trap(CUDA_HOST_SITE) {
  if (!cuda_host::in_kernel()) std::abort();
  cuda_host::raise("__trap()", file, line);
}

// ------------------------------------------------------------------------------------------------
// Runtime functions
// ------------------------------------------------------------------------------------------------

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

namespace cuda_host::detail {
inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
}  // namespace cuda_host::detail

/// The last runtime function's error, which it clears. A bad launch throws instead.
inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_host::detail::last_error, cudaSuccess);
}
inline cudaError_t cudaPeekAtLastError() { return cuda_host::detail::last_error; }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes > 0) std::memset(pointer, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  using namespace cuda_host::detail;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMaxSharedBytes)
    return record(cudaErrorInvalidValue);
  machine.set_shared_limit(reinterpret_cast<const void*>(kernel), static_cast<size_t>(value));
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// 16-bit floats
// ------------------------------------------------------------------------------------------------

namespace cuda_host::detail {

/// Round to nearest even; every NaN becomes 0x7fff, as in cuda_fp16.h.
inline uint16_t float_to_half_bits(uint32_t f) {
  const uint32_t sign = f >> 16 & 0x8000u, magnitude = f & 0x7fffffffu;
  const uint32_t exponent = magnitude >> 23;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (exponent >= 127 + 16) return static_cast<uint16_t>(sign | 0x7c00u);
  if (exponent < 127 - 25) return static_cast<uint16_t>(sign);
  // Below 2^-14 the result is subnormal: a multiple of 2^-24 without a hidden bit.
  const bool subnormal = exponent < 127 - 14;
  const uint32_t from =
      subnormal ? (magnitude & 0x7fffffu) | 0x800000u : magnitude - ((127u - 15u) << 23);
  const uint32_t shift = subnormal ? 126 - exponent : 13;
  uint32_t kept = from >> shift;
  const uint32_t dropped = from & ((1u << shift) - 1), tie = 1u << (shift - 1);
  // A carry out of the mantissa rightly moves to the next exponent, infinity included.
  if (dropped > tie || (dropped == tie && (kept & 1))) ++kept;
  return static_cast<uint16_t>(sign | kept);
}

inline uint32_t half_to_float_bits(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = h >> 10 & 0x1fu;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0x1f) return mantissa != 0 ? 0x7fffffffu : sign | 0x7f800000u;
  if (exponent != 0) return sign | (exponent + 127 - 15) << 23 | mantissa << 13;
  const float value = static_cast<float>(mantissa) * 0x1p-24f;
  return sign | static_cast<uint32_t>(to_bits(value));
}

/// Round to nearest even; every NaN becomes 0x7fff, as in cuda_bf16.h.
inline uint16_t float_to_bfloat16_bits(uint32_t f) {
  if ((f & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((f + 0x7fffu + (f >> 16 & 1)) >> 16);
}

}  // namespace cuda_host::detail

/// Storage and conversions only: kernels compute in float. The conversion to float is explicit, so
/// that arithmetic which CUDA would round to 16 bits does not compile here with another meaning.
struct __align__(2) __half {
  uint16_t bits;
  __half() = default;
  __half(float value)
      : bits(cuda_host::detail::float_to_half_bits(
            static_cast<uint32_t>(cuda_host::detail::to_bits(value)))) {}
  explicit operator float() const {
    return cuda_host::detail::from_bits<float>(cuda_host::detail::half_to_float_bits(bits));
  }
};
using half = __half;

struct __align__(2) __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value)
      : bits(cuda_host::detail::float_to_bfloat16_bits(
            static_cast<uint32_t>(cuda_host::detail::to_bits(value)))) {}
  explicit operator float() const {
    return cuda_host::detail::from_bits<float>(uint64_t{bits} << 16);
  }
};
using nv_bfloat16 = __nv_bfloat16;

struct __align__(4) __half2 {
  __half x, y;
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half2 = __half2;
using nv_bfloat162 = __nv_bfloat162;

inline __half __float2half_rn(float v) { return __half(v); }
inline __half __float2half(float v) { return __half(v); }
inline float __half2float(__half v) { return static_cast<float>(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return static_cast<float>(v); }

inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) {
  return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}

inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  return cuda_host::detail::from_bits<__half>(bits);
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return cuda_host::detail::from_bits<__nv_bfloat16>(bits);
}

// ------------------------------------------------------------------------------------------------
// Barriers and warp operations
// ------------------------------------------------------------------------------------------------

inline void __syncthreads(CUDA_HOST_SITE) {
  cuda_host::detail::machine.meet_block(cuda_host::detail::kSyncThreads, 0, file, line);
}
inline int __syncthreads_count(int predicate, CUDA_HOST_SITE) {
  return static_cast<int>(cuda_host::detail::machine.meet_block(cuda_host::detail::kSyncCount,
                                                                predicate != 0, file, line));
}
inline int __syncthreads_and(int predicate, CUDA_HOST_SITE) {
  return static_cast<int>(cuda_host::detail::machine.meet_block(cuda_host::detail::kSyncAnd,
                                                                predicate != 0, file, line));
}
inline int __syncthreads_or(int predicate, CUDA_HOST_SITE) {
  return static_cast<int>(cuda_host::detail::machine.meet_block(cuda_host::detail::kSyncOr,
                                                                predicate != 0, file, line));
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_SITE) {
  cuda_host::detail::machine.meet_warp(cuda_host::detail::kSyncWarp, mask, 0, 0, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return static_cast<unsigned>(cuda_host::detail::machine.meet_warp(
      cuda_host::detail::kBallot, mask, predicate != 0, 0, file, line));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return static_cast<int>(cuda_host::detail::machine.meet_warp(cuda_host::detail::kAny, mask,
                                                               predicate != 0, 0, file, line));
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return static_cast<int>(cuda_host::detail::machine.meet_warp(cuda_host::detail::kAll, mask,
                                                               predicate != 0, 0, file, line));
}

/// The lanes of the warp that have not exited. (CUDA promises no more than a set with the caller in
/// it; it is not a way to find out who takes a branch.)
inline unsigned __activemask() { return cuda_host::detail::machine.live_lanes(); }

// Overloads rather than templates: an argument of another type converts as it does under nvcc.
// The source lanes are those of PTX shfl: out of the segment means one's own lane, and xor may
// reach into an earlier segment.
#define CUDA_HOST_SHUFFLES(type)                                                                   \
  inline type __shfl_sync(unsigned mask, type value, int source, int width = 32, CUDA_HOST_SITE) { \
    using namespace cuda_host::detail;                                                             \
    const Segment s("__shfl_sync", width, file, line);                                             \
    const unsigned from = s.first + (static_cast<unsigned>(source) & (s.last - s.first));          \
    return from_bits<type>(                                                                        \
        machine.meet_warp(kShuffle<type>, mask, to_bits(value), from, file, line));                \
  }                                                                                                \
  inline type __shfl_up_sync(unsigned mask, type value, unsigned delta, int width = 32,            \
                             CUDA_HOST_SITE) {                                                     \
    using namespace cuda_host::detail;                                                             \
    const Segment s("__shfl_up_sync", width, file, line);                                          \
    const unsigned from = s.lane >= s.first + (delta & 31) ? s.lane - (delta & 31) : s.lane;       \
    return from_bits<type>(                                                                        \
        machine.meet_warp(kShuffleUp<type>, mask, to_bits(value), from, file, line));              \
  }                                                                                                \
  inline type __shfl_down_sync(unsigned mask, type value, unsigned delta, int width = 32,          \
                               CUDA_HOST_SITE) {                                                   \
    using namespace cuda_host::detail;                                                             \
    const Segment s("__shfl_down_sync", width, file, line);                                        \
    const unsigned from = s.lane + (delta & 31) <= s.last ? s.lane + (delta & 31) : s.lane;        \
    return from_bits<type>(                                                                        \
        machine.meet_warp(kShuffleDown<type>, mask, to_bits(value), from, file, line));            \
  }                                                                                                \
  inline type __shfl_xor_sync(unsigned mask, type value, int lane_mask, int width = 32,            \
                              CUDA_HOST_SITE) {                                                    \
    using namespace cuda_host::detail;                                                             \
    const Segment s("__shfl_xor_sync", width, file, line);                                         \
    const unsigned other = s.lane ^ (static_cast<unsigned>(lane_mask) & 31);                       \
    const unsigned from = other <= s.last ? other : s.lane;                                        \
    return from_bits<type>(                                                                        \
        machine.meet_warp(kShuffleXor<type>, mask, to_bits(value), from, file, line));             \
  }
CUDA_HOST_SHUFFLES(int)
CUDA_HOST_SHUFFLES(unsigned)
CUDA_HOST_SHUFFLES(long)
CUDA_HOST_SHUFFLES(unsigned long)
CUDA_HOST_SHUFFLES(long long)
CUDA_HOST_SHUFFLES(unsigned long long)
CUDA_HOST_SHUFFLES(float)
CUDA_HOST_SHUFFLES(double)
CUDA_HOST_SHUFFLES(__half)
CUDA_HOST_SHUFFLES(__nv_bfloat16)
#undef CUDA_HOST_SHUFFLES

#define CUDA_HOST_MATCH(type)                                                                   \
  inline unsigned __match_any_sync(unsigned mask, type value, CUDA_HOST_SITE) {                 \
    using namespace cuda_host::detail;                                                          \
    return static_cast<unsigned>(                                                               \
        machine.meet_warp(kMatchAny<type>, mask, to_bits(value), 0, file, line));               \
  }                                                                                             \
  inline unsigned __match_all_sync(unsigned mask, type value, int* predicate, CUDA_HOST_SITE) { \
    using namespace cuda_host::detail;                                                          \
    const unsigned same = static_cast<unsigned>(                                                \
        machine.meet_warp(kMatchAll<type>, mask, to_bits(value), 0, file, line));               \
    *predicate = same == (mask & machine.live_lanes());                                         \
    return *predicate ? mask : 0;                                                               \
  }
CUDA_HOST_MATCH(int)
CUDA_HOST_MATCH(unsigned)
CUDA_HOST_MATCH(long)
CUDA_HOST_MATCH(unsigned long)
CUDA_HOST_MATCH(long long)
CUDA_HOST_MATCH(unsigned long long)
CUDA_HOST_MATCH(float)
CUDA_HOST_MATCH(double)
#undef CUDA_HOST_MATCH

#define CUDA_HOST_REDUCE(name, collective, type)                                   \
  inline type name(unsigned mask, type value, CUDA_HOST_SITE) {                    \
    using namespace cuda_host::detail;                                             \
    return from_bits<type>(                                                        \
        machine.meet_warp(collective<type>, mask, to_bits(value), 0, file, line)); \
  }
CUDA_HOST_REDUCE(__reduce_add_sync, kReduceAdd, int)
CUDA_HOST_REDUCE(__reduce_add_sync, kReduceAdd, unsigned)
CUDA_HOST_REDUCE(__reduce_min_sync, kReduceMin, int)
CUDA_HOST_REDUCE(__reduce_min_sync, kReduceMin, unsigned)
CUDA_HOST_REDUCE(__reduce_max_sync, kReduceMax, int)
CUDA_HOST_REDUCE(__reduce_max_sync, kReduceMax, unsigned)
CUDA_HOST_REDUCE(__reduce_and_sync, kReduceAnd, unsigned)
CUDA_HOST_REDUCE(__reduce_or_sync, kReduceOr, unsigned)
CUDA_HOST_REDUCE(__reduce_xor_sync, kReduceXor, unsigned)
#undef CUDA_HOST_REDUCE
#undef CUDA_HOST_SITE

// ------------------------------------------------------------------------------------------------
// Memory: one thread runs at a time, so plain reads and writes are atomic and ordered
// ------------------------------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

/// Lets the other threads of the block run; a loop that waits for one of them must call it.
inline void __nanosleep(unsigned) { cuda_host::detail::machine.yield(); }

#define CUDA_HOST_LOAD(name)        \
  template <typename T>             \
  inline T name(const T* pointer) { \
    return *pointer;                \
  }
CUDA_HOST_LOAD(__ldg)
CUDA_HOST_LOAD(__ldca)
CUDA_HOST_LOAD(__ldcg)
CUDA_HOST_LOAD(__ldcs)
CUDA_HOST_LOAD(__ldcv)
CUDA_HOST_LOAD(__ldlu)
#undef CUDA_HOST_LOAD

#define CUDA_HOST_STORE(name)                                 \
  template <typename T>                                       \
  inline void name(T* pointer, std::common_type_t<T> value) { \
    *pointer = value;                                         \
  }
CUDA_HOST_STORE(__stcg)
CUDA_HOST_STORE(__stcs)
CUDA_HOST_STORE(__stwb)
CUDA_HOST_STORE(__stwt)
#undef CUDA_HOST_STORE

// The detector of races says who called, so these are functions of their own there.
#ifdef DHCL_HOST_RACE
#define CUDA_HOST_ATOMIC_INLINE __attribute__((noinline)) inline
#else
#define CUDA_HOST_ATOMIC_INLINE inline
#endif
#define CUDA_HOST_ATOMIC_ACCESS(address)                                                          \
  ::cuda_host::race::strong_access(address, sizeof(*address), true, __builtin_return_address(0)); \
  const ::cuda_host::race::Watch off(false)

#define CUDA_HOST_ATOMIC(name, type, expression)                 \
  CUDA_HOST_ATOMIC_INLINE type name(type* address, type value) { \
    CUDA_HOST_ATOMIC_ACCESS(address);                            \
    const type old = *address;                                   \
    *address = static_cast<type>(expression);                    \
    return old;                                                  \
  }
// Signed sums wrap on the device; through unsigned they do here too.
CUDA_HOST_ATOMIC(atomicAdd, int, static_cast<unsigned>(old) + static_cast<unsigned>(value))
CUDA_HOST_ATOMIC(atomicAdd, unsigned, old + value)
CUDA_HOST_ATOMIC(atomicAdd, unsigned long long, old + value)
CUDA_HOST_ATOMIC(atomicAdd, float, old + value)
CUDA_HOST_ATOMIC(atomicAdd, double, old + value)
CUDA_HOST_ATOMIC(atomicAdd, __half, static_cast<float>(old) + static_cast<float>(value))
CUDA_HOST_ATOMIC(atomicAdd, __nv_bfloat16, static_cast<float>(old) + static_cast<float>(value))
CUDA_HOST_ATOMIC(atomicSub, int, static_cast<unsigned>(old) - static_cast<unsigned>(value))
CUDA_HOST_ATOMIC(atomicSub, unsigned, old - value)
CUDA_HOST_ATOMIC(atomicExch, int, value)
CUDA_HOST_ATOMIC(atomicExch, unsigned, value)
CUDA_HOST_ATOMIC(atomicExch, unsigned long long, value)
CUDA_HOST_ATOMIC(atomicExch, float, value)
CUDA_HOST_ATOMIC(atomicMin, int, value < old ? value : old)
CUDA_HOST_ATOMIC(atomicMin, unsigned, value < old ? value : old)
CUDA_HOST_ATOMIC(atomicMin, long long, value < old ? value : old)
CUDA_HOST_ATOMIC(atomicMin, unsigned long long, value < old ? value : old)
CUDA_HOST_ATOMIC(atomicMax, int, value > old ? value : old)
CUDA_HOST_ATOMIC(atomicMax, unsigned, value > old ? value : old)
CUDA_HOST_ATOMIC(atomicMax, long long, value > old ? value : old)
CUDA_HOST_ATOMIC(atomicMax, unsigned long long, value > old ? value : old)
CUDA_HOST_ATOMIC(atomicAnd, int, old& value)
CUDA_HOST_ATOMIC(atomicAnd, unsigned, old& value)
CUDA_HOST_ATOMIC(atomicAnd, unsigned long long, old& value)
CUDA_HOST_ATOMIC(atomicOr, int, old | value)
CUDA_HOST_ATOMIC(atomicOr, unsigned, old | value)
CUDA_HOST_ATOMIC(atomicOr, unsigned long long, old | value)
CUDA_HOST_ATOMIC(atomicXor, int, old ^ value)
CUDA_HOST_ATOMIC(atomicXor, unsigned, old ^ value)
CUDA_HOST_ATOMIC(atomicXor, unsigned long long, old ^ value)
CUDA_HOST_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
CUDA_HOST_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
#undef CUDA_HOST_ATOMIC

#define CUDA_HOST_CAS(type)                                                         \
  CUDA_HOST_ATOMIC_INLINE type atomicCAS(type* address, type compare, type value) { \
    CUDA_HOST_ATOMIC_ACCESS(address);                                               \
    const type old = *address;                                                      \
    if (old == compare) *address = value;                                           \
    return old;                                                                     \
  }
CUDA_HOST_CAS(int)
CUDA_HOST_CAS(unsigned)
CUDA_HOST_CAS(unsigned long long)
CUDA_HOST_CAS(unsigned short)
#undef CUDA_HOST_CAS
#undef CUDA_HOST_ATOMIC_ACCESS
#undef CUDA_HOST_ATOMIC_INLINE

// ------------------------------------------------------------------------------------------------
// Bits
// ------------------------------------------------------------------------------------------------

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) {
  return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v));
}
inline unsigned long long __brevll(unsigned long long v) {
  unsigned long long reversed = 0;
  for (int i = 0; i < 64; ++i) reversed |= (v >> i & 1) << (63 - i);
  return reversed;
}
inline unsigned __brev(unsigned v) { return static_cast<unsigned>(__brevll(v) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  return static_cast<unsigned>(both << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  return static_cast<unsigned>(both >> (shift & 31));
}

inline int __float_as_int(float v) {
  return cuda_host::detail::from_bits<int>(cuda_host::detail::to_bits(v));
}
inline unsigned __float_as_uint(float v) {
  return cuda_host::detail::from_bits<unsigned>(cuda_host::detail::to_bits(v));
}
inline float __int_as_float(int v) {
  return cuda_host::detail::from_bits<float>(cuda_host::detail::to_bits(v));
}
inline float __uint_as_float(unsigned v) {
  return cuda_host::detail::from_bits<float>(cuda_host::detail::to_bits(v));
}
inline long long __double_as_longlong(double v) {
  return cuda_host::detail::from_bits<long long>(cuda_host::detail::to_bits(v));
}
inline double __longlong_as_double(long long v) {
  return cuda_host::detail::from_bits<double>(cuda_host::detail::to_bits(v));
}

// ------------------------------------------------------------------------------------------------
// Arithmetic
// ------------------------------------------------------------------------------------------------

// Each rounds once, provided that the build says -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __drcp_rn(double a) { return 1.0 / a; }

// Approximate on the device; within its error bounds here, not equal to it.
inline float __expf(float v) { return std::exp(v); }
inline float __exp10f(float v) { return std::pow(10.0f, v); }
inline float __logf(float v) { return std::log(v); }
inline float __log2f(float v) { return std::log2(v); }
inline float __log10f(float v) { return std::log10(v); }
inline float __powf(float a, float b) { return std::pow(a, b); }
inline float __sinf(float v) { return std::sin(v); }
inline float __cosf(float v) { return std::cos(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }
#if !__GLIBC_PREREQ(2, 42)  // later ones have their own
inline float rsqrtf(float v) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(v))); }
inline double rsqrt(double v) { return 1.0 / std::sqrt(v); }
#endif

namespace cuda_host::detail {
/// Conversion to an integer as cvt does it: out of range saturates; NaN is 0, or the least value
/// where the integer has 64 bits.
template <typename Integer>
Integer saturate(double whole) {
  using Limits = std::numeric_limits<Integer>;
  if (std::isnan(whole))
    return sizeof(Integer) == 8 ? static_cast<Integer>(1ull << 63) : Integer{0};
  // The first value above the range is a power of two, hence exact.
  if (whole >= std::ldexp(1.0, Limits::digits)) return Limits::max();
  if (whole < static_cast<double>(Limits::min())) return Limits::min();
  return static_cast<Integer>(whole);
}
}  // namespace cuda_host::detail

#define CUDA_HOST_TO_INTEGER(name, from, to)                                                 \
  inline to name##_rn(from v) { return cuda_host::detail::saturate<to>(std::nearbyint(v)); } \
  inline to name##_rz(from v) { return cuda_host::detail::saturate<to>(std::trunc(v)); }     \
  inline to name##_rd(from v) { return cuda_host::detail::saturate<to>(std::floor(v)); }     \
  inline to name##_ru(from v) { return cuda_host::detail::saturate<to>(std::ceil(v)); }
CUDA_HOST_TO_INTEGER(__float2int, float, int)
CUDA_HOST_TO_INTEGER(__float2uint, float, unsigned)
CUDA_HOST_TO_INTEGER(__float2ll, float, long long)
CUDA_HOST_TO_INTEGER(__double2int, double, int)
CUDA_HOST_TO_INTEGER(__double2ll, double, long long)
#undef CUDA_HOST_TO_INTEGER

inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
inline float __ll2float_rn(long long v) { return static_cast<float>(v); }
inline double __ll2double_rn(long long v) { return static_cast<double>(v); }
inline float __double2float_rn(double v) { return static_cast<float>(v); }

// CUDA's overloads and no others, so that a call which nvcc finds ambiguous is so here too. int
// with unsigned compares as unsigned; for floats a NaN loses against a number.
#define CUDA_HOST_MIN_MAX(result, a_type, b_type)                        \
  inline result min(a_type a, b_type b) {                                \
    const result x = static_cast<result>(a), y = static_cast<result>(b); \
    return y < x ? y : x;                                                \
  }                                                                      \
  inline result max(a_type a, b_type b) {                                \
    const result x = static_cast<result>(a), y = static_cast<result>(b); \
    return x < y ? y : x;                                                \
  }
#define CUDA_HOST_MIN_MAX_INTEGERS(type)                \
  CUDA_HOST_MIN_MAX(type, type, type)                   \
  CUDA_HOST_MIN_MAX(unsigned type, unsigned type, type) \
  CUDA_HOST_MIN_MAX(unsigned type, type, unsigned type) \
  CUDA_HOST_MIN_MAX(unsigned type, unsigned type, unsigned type)
CUDA_HOST_MIN_MAX_INTEGERS(int)
CUDA_HOST_MIN_MAX_INTEGERS(long)
CUDA_HOST_MIN_MAX_INTEGERS(long long)
#undef CUDA_HOST_MIN_MAX_INTEGERS
#undef CUDA_HOST_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double min(float a, double b) { return std::fmin(static_cast<double>(a), b); }
inline double min(double a, float b) { return std::fmin(a, static_cast<double>(b)); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double max(float a, double b) { return std::fmax(static_cast<double>(a), b); }
inline double max(double a, float b) { return std::fmax(a, static_cast<double>(b)); }
