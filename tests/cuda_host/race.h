// Finds data races in kernels that run on cuda_host.h, whatever the order in which they run.
//
// The kernels are compiled with g++'s -fsanitize=thread, which puts a call before every access to
// memory, and are linked to race.cpp in place of the compiler's own library: it answers those calls
// with CUDA's rules. Two accesses of which one writes must be ordered, or both be atomic or
// volatile:
//   - launches follow each other; blocks of one launch are never ordered;
//   - __syncthreads and its kin order the threads of a block;
//   - __syncwarp orders the lanes of its mask. Shuffles and votes do not, as CUDA says;
//   - a fence orders nothing here, nor does an atomic: a flag that hands memory to another thread
//     would be called a race.
// What is ordered by these rules is known from the barriers that a thread has passed, not from who
// ran first, so one run finds the races of every order that takes the same branches.
//
// __shared__ memory that a block reads before it has written it is reported too.
//
// Environment (read at every launch):
//   DHCL_HOST_RACE_WITHOUT   file.cu:LINE, a barrier that is met but orders nothing, as if it were
//                            not there.
//   DHCL_HOST_RACE_BARRIERS  a file to which the places of all barriers that were passed are added.
//
// Without DHCL_HOST_RACE all of this is empty.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_host::race {

#ifdef DHCL_HOST_RACE

/// A launch with `threads` threads a block and this dynamic shared memory begins.
void begin_launch(unsigned threads, const void* shared, size_t bytes);
/// What was found in the launch, a line for each pair of places; empty if nothing was.
std::string end_launch();
void begin_block(uint64_t block);
/// The thread that runs from now on, with its stack.
void run_thread(unsigned linear, const void* stack, size_t bytes);
/// All live threads of the block have met at this place.
void block_barrier(const char* file, int line);
/// These lanes of the warp have met at this place.
void warp_barrier(unsigned warp, uint32_t lanes, const char* file, int line);
/// A variable of the emulator's own, which kernels read and which is not __shared__; for a launch.
void exempt(const void* variable, size_t bytes);
/// An atomic or volatile access, made by the caller of `pc`.
void strong_access(const void* address, size_t bytes, bool write, const void* pc);

/// Whether accesses count, for as long as this lives: what the emulator does for a kernel does not.
class Watch {
 public:
  explicit Watch(bool on);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  bool before_;
};

#else

inline void begin_launch(unsigned, const void*, size_t) {}
inline std::string end_launch() { return {}; }
inline void begin_block(uint64_t) {}
inline void run_thread(unsigned, const void*, size_t) {}
inline void block_barrier(const char*, int) {}
inline void warp_barrier(unsigned, uint32_t, const char*, int) {}
inline void exempt(const void*, size_t) {}
inline void strong_access(const void*, size_t, bool, const void*) {}
struct Watch {
  explicit Watch(bool) {}
};

#endif

}  // namespace cuda_host::race
