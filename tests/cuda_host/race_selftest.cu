// Kernels with and without races, which try out race.h.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cuda_host.h"

namespace {

constexpr int kThreads = 64;

// Each thread reads what its right-hand neighbour wrote; `how` says what lies between.
enum class Order { kNone, kBarrier, kVote, kWarpBarrier, kShuffle, kHalfWarpBarrier };

__device__ void put_between(Order order) {
  if (order == Order::kBarrier) __syncthreads();
  if (order == Order::kVote) __syncthreads_or(0);
  if (order == Order::kWarpBarrier) __syncwarp();
  if (order == Order::kShuffle) __shfl_sync(0xffffffffu, 1, 0);
  if (order == Order::kHalfWarpBarrier) __syncwarp(threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u);
}

// `reach`: within how many threads the neighbour lies.
__global__ void exchange(Order order, int reach, int* out) {
  __shared__ int values[kThreads];
  const int self = static_cast<int>(threadIdx.x);
  values[self] = self;
  put_between(order);
  out[self] = values[self / reach * reach + (self + 1) % reach];
}

__global__ void exchange_in_dynamic_memory(Order order, int* out) {
  DHCL_DYNAMIC_SHARED(uint16_t, values);
  const int self = static_cast<int>(threadIdx.x);
  values[self] = static_cast<uint16_t>(self);
  put_between(order);
  out[blockIdx.x * kThreads + self] = values[(self + 1) % kThreads];
}

// Read by all, then written by one, which is what a forgotten second barrier of a loop does.
__global__ void write_after_read(bool barrier, int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 1;
  __syncthreads();
  out[threadIdx.x] = value;
  if (barrier) __syncthreads();
  if (threadIdx.x == 17) value = 2;
}

enum class Cell { kPlain, kAtomic, kMixed, kVolatile, kVolatileRead };

__global__ void blocks_meet(Cell how, int* cell) {
  if (threadIdx.x != 0) return;
  const bool first = blockIdx.x == 0;
  if (how == Cell::kPlain) *cell = 7;
  if (how == Cell::kAtomic || (how == Cell::kMixed && first)) atomicAdd(cell, 1);
  if (how == Cell::kMixed && !first) *cell = 7;
  if (how == Cell::kVolatile) *static_cast<volatile int*>(cell) = 7;
  if (how == Cell::kVolatileRead) {
    if (first) *cell = 7;
    if (!first && *static_cast<volatile int*>(cell) > 7) __trap();
  }
}

// Neighbouring elements are no race, however narrow they are.
template <typename T>
__global__ void neighbours(T* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<T>(threadIdx.x);
}

__global__ void read_garbage(bool dynamic, bool written, int* out) {
  __shared__ int fixed[2];
  DHCL_DYNAMIC_SHARED(int, asked_for);
  int* values = dynamic ? asked_for : fixed;
  // The first block writes: what it leaves is not the second block's to read.
  if (written || blockIdx.x == 0) values[1] = 3;
  out[blockIdx.x] = values[1];
}

// Everybody reads one value of global memory, and one thread writes it.
__global__ void many_readers(int writer, int* cell, int* out) {
  const int self = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (self == writer) {
    *cell = 1;
  } else {
    out[self] = *cell;
  }
}

void run_exchange(int order, int reach) {
  std::vector<int> out(kThreads);
  DHCL_LAUNCH(exchange, 1, kThreads, 0, nullptr, static_cast<Order>(order), reach, out.data());
}

void run_dynamic_exchange(int order) {
  std::vector<int> out(2 * kThreads);
  DHCL_LAUNCH(exchange_in_dynamic_memory, 2, kThreads, kThreads * sizeof(uint16_t), nullptr,
              static_cast<Order>(order), out.data());
}

void run_write_after_read(bool barrier) {
  std::vector<int> out(kThreads);
  DHCL_LAUNCH(write_after_read, 1, kThreads, 0, nullptr, barrier, out.data());
}

void run_blocks_meet(int how, int blocks) {
  int cell = 0;
  DHCL_LAUNCH(blocks_meet, blocks, kThreads, 0, nullptr, static_cast<Cell>(how), &cell);
  DHCL_LAUNCH(blocks_meet, 1, kThreads, 0, nullptr, Cell::kPlain, &cell);
}

template <typename T>
void run_neighbours() {
  std::vector<T> out(3 * 37);
  DHCL_LAUNCH(neighbours<T>, 3, 37, 0, nullptr, out.data());
}

void run_read_garbage(bool dynamic, bool written) {
  std::vector<int> out(2);
  DHCL_LAUNCH(read_garbage, 2, 1, 2 * sizeof(int), nullptr, dynamic, written, out.data());
}

void run_many_readers(int writer) {
  int cell = 0;
  std::vector<int> out(3 * kThreads);
  DHCL_LAUNCH(many_readers, 3, kThreads, 0, nullptr, writer, &cell, out.data());
}

}  // namespace

PYBIND11_MODULE(race_selftest, m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  m.def("exchange", &run_exchange);
  m.def("exchange_in_dynamic_memory", &run_dynamic_exchange);
  m.def("write_after_read", &run_write_after_read);
  m.def("blocks_meet", &run_blocks_meet);
  m.def("neighbours", [] {
    run_neighbours<uint8_t>();
    run_neighbours<uint16_t>();
    run_neighbours<double>();
  });
  m.def("read_garbage", &run_read_garbage);
  m.def("many_readers", &run_many_readers);
}
