// The race detector that race.h describes. Compiled without -fsanitize=thread.
//
// Each eight bytes of memory have a short list of the accesses that a later one may conflict with.
// An access leaves the list once another one that follows it stands for it. Where more than kKept
// accesses of eight bytes are unordered (many threads read one value), some of those that are not
// plain writes are dropped, so that a race against exactly these is missed; two of them stay in any
// case, and a write that conflicts with a reader nearly always conflicts with two.
#include "race.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

namespace cuda_host::race {
namespace {

constexpr unsigned kLanes = 32;
constexpr uintptr_t kGrain = 8;
constexpr uintptr_t kPage = 4096;
constexpr unsigned kKept = 12;   // more than the eight last writes of eight bytes
constexpr size_t kReported = 8;  // pairs of places in one message
constexpr size_t kPages = 20000;

struct Access {
  const void* pc;
  uint64_t block;
  uint32_t epoch;  // barriers of the block that were passed
  uint32_t clock;  // barriers of the warp that were passed
  uint16_t thread;
  uint8_t bytes;  // which of the eight
  bool write;
  bool strong;  // atomic or volatile
};

struct Cell {
  std::array<Access, kKept> accesses;
  uint64_t block = 0;
  uint32_t launch = 0;
  uint8_t count = 0;
  uint8_t written = 0;  // by this block; only for shared memory
};
using Page = std::array<Cell, kPage / kGrain>;

struct Range {
  uintptr_t low = 0, high = 0;
  bool holds(uintptr_t a) const { return a >= low && a < high; }
};

struct Detector {
  bool watching = false;
  uint32_t launch = 0;
  uint64_t block = 0;
  uint32_t epoch = 0;
  unsigned self = 0;
  unsigned turn = 0;  // who is dropped next
  // [thread][lane of its warp]: the lane's barriers that the thread knows of.
  std::vector<std::array<uint32_t, kLanes>> clocks;
  Range stack, dynamic_shared, statics;
  std::vector<Range> exempt;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_number = ~uintptr_t{0};
  Page* last_page = nullptr;
  std::set<std::pair<const void*, const void*>> told;
  std::string report;
  std::set<std::pair<const char*, int>> barriers;  // passed in this launch
  std::string ignored_barrier;                     // "file.cu:LINE"
} state;

Range range(const void* p, size_t bytes) {
  const auto low = reinterpret_cast<uintptr_t>(p);
  return {low, low + bytes};
}

Cell& cell_of(uintptr_t a) {
  const uintptr_t number = a / kPage;
  if (number != state.last_number) {
    auto& page = state.pages[number];
    if (!page) page = std::make_unique<Page>();
    state.last_page = page.get();
    state.last_number = number;
  }
  return (*state.last_page)[a % kPage / kGrain];
}

bool is_shared(uintptr_t a) {
  if (state.dynamic_shared.holds(a)) return true;
  if (!state.statics.holds(a)) return false;
  return std::none_of(state.exempt.begin(), state.exempt.end(),
                      [a](const Range& r) { return r.holds(a); });
}

// Whether what was done then comes before what the running thread does now, in every order.
bool before(const Access& then) {
  if (then.block != state.block) return false;
  if (then.thread == state.self || then.epoch < state.epoch) return true;
  return then.thread / kLanes == state.self / kLanes &&
         state.clocks[state.self][then.thread % kLanes] >= then.clock;
}

// "file.cu:LINE", innermost call first, of the code that returns to `pc`.
std::string place(const void* pc) {
  Dl_info info{};
  if (dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return "?";
  char command[4400];
  const auto offset =
      reinterpret_cast<uintptr_t>(pc) - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::snprintf(command, sizeof command, "addr2line -ise '%.4096s' 0x%zx 2>/dev/null",
                info.dli_fname, static_cast<size_t>(offset));
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "?";
  std::string text;
  char line[512];
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    std::string frame(line, std::strcspn(line, " \n"));
    // The emulator's own frames say nothing of the kernel.
    if (frame.rfind("cuda_host.h:", 0) == 0) continue;
    text += (text.empty() ? "" : " in ") + frame;
  }
  pclose(pipe);
  return text.empty() ? "?" : text;
}

std::string describe(const Access& access) {
  char text[160];
  std::snprintf(text, sizeof text, "block %llu thread %u %s%s at ",
                static_cast<unsigned long long>(access.block), static_cast<unsigned>(access.thread),
                access.strong ? "atomically or volatile " : "", access.write ? "writes" : "reads");
  return text + place(access.pc);
}

void report(uintptr_t address, const Access& now, const Access* then) {
  const auto pair = std::make_pair(then == nullptr ? nullptr : then->pc, now.pc);
  if (state.told.size() >= kReported || !state.told.insert(pair).second) return;
  const char* memory = is_shared(address) ? "shared" : "global";
  state.report += std::string("\n  ") + memory + " memory: " + describe(now);
  state.report += then == nullptr ? ", which this block has not written"
                                  : ", unordered with: " + describe(*then);
}

// Takes out what the new access stands for, and what has been reported.
void compare(Cell& cell, uintptr_t address, const Access& now) {
  unsigned kept = 0;
  for (unsigned i = 0; i < cell.count; ++i) {
    Access& then = cell.accesses[i];
    if ((then.bytes & now.bytes) != 0) {
      const bool ordered = before(then);
      const bool race = !ordered && (then.write || now.write) && !(then.strong && now.strong);
      if (race) report(address, now, &then);
      const bool stands_for = ordered && (now.write || !then.write) && (then.strong || !now.strong);
      if (race || stands_for) then.bytes &= static_cast<uint8_t>(~now.bytes);
    }
    if (then.bytes != 0) cell.accesses[kept++] = then;
  }
  cell.count = static_cast<uint8_t>(kept);
}

void add(Cell& cell, const Access& now) {
  if (cell.count < kKept) {
    cell.accesses[cell.count++] = now;
    return;
  }
  // The first two of those that may go stay.
  std::array<unsigned, kKept> droppable;
  unsigned found = 0;
  for (unsigned i = 0; i < kKept; ++i)
    if (!cell.accesses[i].write || cell.accesses[i].strong) droppable[found++] = i;
  const unsigned first = found > 2 ? 2 : found - 1;
  cell.accesses[droppable[first + state.turn++ % (found - first)]] = now;
}

void touch_cell(uintptr_t address, Access now) {
  Cell& cell = cell_of(address);
  const bool shared = is_shared(address);
  if (cell.launch != state.launch || (shared && cell.block != state.block)) {
    cell.launch = state.launch;
    cell.block = state.block;
    cell.count = cell.written = 0;
  }
  if (shared && !now.write && (now.bytes & ~cell.written) != 0) report(address, now, nullptr);
  // A read counts as a write here, so that garbage is reported once.
  cell.written |= now.bytes;
  compare(cell, address, now);
  add(cell, now);
}

void touch(const void* p, size_t bytes, bool write, bool strong, const void* pc) {
  const auto first = reinterpret_cast<uintptr_t>(p);
  if (!state.watching || bytes == 0 || state.stack.holds(first)) return;
  state.watching = false;
  Access now{pc,
             state.block,
             state.epoch,
             state.clocks[state.self][state.self % kLanes],
             static_cast<uint16_t>(state.self),
             0,
             write,
             strong};
  for (uintptr_t grain = first / kGrain * kGrain; grain < first + bytes; grain += kGrain) {
    const uintptr_t low = std::max(first, grain), high = std::min(first + bytes, grain + kGrain);
    now.bytes = static_cast<uint8_t>(((1u << (high - low)) - 1) << (low - grain));
    touch_cell(low, now);
  }
  state.watching = true;
}

// The module's variables without an initial value: among them its static __shared__ memory.
int find_statics(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&state);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + part.p_vaddr;
    const Range all{start, start + part.p_memsz};
    if (part.p_type != PT_LOAD || !all.holds(here)) continue;
    state.statics = {start + part.p_filesz, all.high};
    return 1;
  }
  return 0;
}

std::string barrier_name(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
}

// Whether a barrier orders memory: one that DHCL_HOST_RACE_WITHOUT names does not.
bool pass_barrier(const char* file, int line) {
  state.barriers.emplace(file, line);
  return state.ignored_barrier.empty() || state.ignored_barrier != barrier_name(file, line);
}

// Appends the places of the barriers that were passed to the file that DHCL_HOST_RACE_BARRIERS
// names.
void write_barriers() {
  const char* path = std::getenv("DHCL_HOST_RACE_BARRIERS");
  FILE* file = path == nullptr ? nullptr : std::fopen(path, "a");
  if (file == nullptr) return;
  for (const auto& [name, line] : state.barriers)
    std::fprintf(file, "%s\n", barrier_name(name, line).c_str());
  std::fclose(file);
}

}  // namespace

void begin_launch(unsigned threads, const void* shared, size_t bytes) {
  if (state.statics.high == 0) dl_iterate_phdr(find_statics, nullptr);
  const char* without = std::getenv("DHCL_HOST_RACE_WITHOUT");
  state.ignored_barrier = without == nullptr ? "" : without;
  ++state.launch;
  state.dynamic_shared = range(shared, bytes);
  state.clocks.assign(threads, {});
  state.exempt.clear();
  state.barriers.clear();
  state.told.clear();
  state.report.clear();
  if (state.pages.size() > kPages) {
    state.pages.clear();
    state.last_number = ~uintptr_t{0};
  }
}

std::string end_launch() {
  state.watching = false;
  write_barriers();
  state.barriers.clear();
  return std::exchange(state.report, {});
}

void begin_block(uint64_t block) {
  state.block = block;
  state.epoch = 0;
  for (size_t t = 0; t < state.clocks.size(); ++t) {
    state.clocks[t].fill(0);
    state.clocks[t][t % kLanes] = 1;
  }
}

void run_thread(unsigned linear, const void* stack, size_t bytes) {
  state.self = linear;
  state.stack = range(stack, bytes);
}

void block_barrier(const char* file, int line) {
  if (pass_barrier(file, line)) ++state.epoch;
}

void warp_barrier(unsigned warp, uint32_t lanes, const char* file, int line) {
  if (!pass_barrier(file, line)) return;
  std::array<uint32_t, kLanes> joined{};
  const auto each = [&](auto f) {
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if (lanes >> lane & 1) f(state.clocks[warp * kLanes + lane], lane);
  };
  each([&](const auto& clock, unsigned) {
    for (unsigned k = 0; k < kLanes; ++k) joined[k] = std::max(joined[k], clock[k]);
  });
  each([&](auto& clock, unsigned lane) {
    clock = joined;
    ++clock[lane];
  });
}

void exempt(const void* variable, size_t bytes) { state.exempt.push_back(range(variable, bytes)); }

Watch::Watch(bool on) : before_(std::exchange(state.watching, on)) {}
Watch::~Watch() { state.watching = before_; }

void strong_access(const void* address, size_t bytes, bool write, const void* pc) {
  touch(address, bytes, write, true, pc);
}

}  // namespace cuda_host::race

// ------------------------------------------------------------------------------------------------
// What g++ -fsanitize=thread calls
// ------------------------------------------------------------------------------------------------

using cuda_host::race::touch;

#define RACE_HOOK extern "C" __attribute__((visibility("hidden")))
#define RACE_ACCESS(name, bytes, write, strong)                  \
  RACE_HOOK void __tsan_##name(void* p) {                        \
    touch(p, bytes, write, strong, __builtin_return_address(0)); \
  }
#define RACE_ACCESSES(bytes)                                      \
  RACE_ACCESS(read##bytes, bytes, false, false)                   \
  RACE_ACCESS(write##bytes, bytes, true, false)                   \
  RACE_ACCESS(unaligned_read##bytes, bytes, false, false)         \
  RACE_ACCESS(unaligned_write##bytes, bytes, true, false)         \
  RACE_ACCESS(volatile_read##bytes, bytes, false, true)           \
  RACE_ACCESS(volatile_write##bytes, bytes, true, true)           \
  RACE_ACCESS(unaligned_volatile_read##bytes, bytes, false, true) \
  RACE_ACCESS(unaligned_volatile_write##bytes, bytes, true, true)
RACE_ACCESSES(1)
RACE_ACCESSES(2)
RACE_ACCESSES(4)
RACE_ACCESSES(8)
RACE_ACCESSES(16)
RACE_HOOK void __tsan_read_range(void* p, size_t bytes) {
  touch(p, bytes, false, false, __builtin_return_address(0));
}
RACE_HOOK void __tsan_write_range(void* p, size_t bytes) {
  touch(p, bytes, true, false, __builtin_return_address(0));
}
RACE_HOOK void __tsan_init() {}
RACE_HOOK void __tsan_func_entry(void*) {}
RACE_HOOK void __tsan_func_exit() {}
RACE_HOOK void __tsan_vptr_update(void**, void*) {}
RACE_HOOK void __tsan_vptr_read(void**) {}

// std::atomic and the guards of the emulator's own variables: the host's threads, not CUDA's.
#define RACE_ATOMIC(bits, type)                                                                   \
  RACE_HOOK type __tsan_atomic##bits##_load(const volatile type* p, int) {                        \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                               \
  RACE_HOOK void __tsan_atomic##bits##_store(volatile type* p, type v, int) {                     \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                               \
  RACE_HOOK type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) {                  \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                           \
  }                                                                                               \
  RACE_HOOK type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) {                 \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                               \
  RACE_HOOK type __tsan_atomic##bits##_fetch_sub(volatile type* p, type v, int) {                 \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                               \
  RACE_HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* want,       \
                                                              type v, int, int) {                 \
    return __atomic_compare_exchange_n(p, want, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);    \
  }                                                                                               \
  RACE_HOOK int __tsan_atomic##bits##_compare_exchange_weak(volatile type* p, type* want, type v, \
                                                            int, int) {                           \
    return __atomic_compare_exchange_n(p, want, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);     \
  }
RACE_ATOMIC(8, uint8_t)
RACE_ATOMIC(16, uint16_t)
RACE_ATOMIC(32, uint32_t)
RACE_ATOMIC(64, uint64_t)
RACE_HOOK void __tsan_atomic_thread_fence(int) {}
