// Kernels that try out cuda_host.h, as plain functions on arrays.
#pragma once
#include <cstdint>
#include <string>

namespace selftest {

enum class WarpOp : int {
  kShfl,
  kShflUp,
  kShflDown,
  kShflXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kMatchAll,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
};

// One block of n threads. Thread i returns at once where mask[i] is 0; else it takes part in `op`
// with that mask, and out[i] is what it gets.
void warp_op(WarpOp op, const unsigned* mask, const int* value, const int* arg, int width, int* out,
             int n);
// Every lane reads value[lane ^ 1] by way of each type that can be shuffled; out has 10 columns.
void shuffle_types(const int* value, double* out, int n);

// Sums of the rows of x, one block each: in shared memory, and by warp shuffles.
void row_sums(const float* x, float* by_tree, float* by_shuffle, int rows, int columns,
              int threads);
// out[4 * i] = count, and, or of the predicates; and the number of threads seen by a last barrier.
// Threads with predicate < 0 have returned before.
void block_votes(const int* predicate, int* out, int n);
// Sums along a ring of threads, after all but the first `stay` have returned.
void ring(int* out, int n, int stay, bool barrier);
// Thread coordinates, in the order in which the threads ran: out[i] = (block, thread, phase).
void record_order(int* out, int blocks, int threads);
void coordinates(unsigned* out, const unsigned* grid, const unsigned* block);

// Every atomic of one type on cells of its own; see atomics_kernel.
template <typename T>
void atomics(T* cells, const T* values, T* old, int n);
void floating_atomics(float* f, double* d, int* counter, int n);

// Floats and bits; see the kernels for what the columns hold.
void half_bits(const float* in, uint16_t* half, uint16_t* bfloat16, int64_t n);
void half_values(const uint16_t* in, float* half, float* bfloat16, int64_t n);
void bits(const uint64_t* in, int64_t* out, int n);
void rounding(const float* a, const float* b, const float* c, float* out, int n);
void to_integers(const float* in, int64_t* out, int n);
void mixed_min_max(double* out);
void vectors(const float* in, float* out, int n);

// The bytes a block of `threads` sees in `bytes` bytes of dynamic shared memory before it writes.
void fresh_shared(unsigned char* out, int blocks, int bytes);
// Writes `count` ints into dynamic shared memory that has room for `room`.
void fill_shared(int* out, int room, int count);
void spin(int* out, int threads);

void empty(const unsigned* grid, const unsigned* block, uint64_t shared_bytes);
std::string opt_in(int bytes, uint64_t shared_bytes);

// Faults. `live_objects` counts objects on the stacks of threads; none may be left after an error.
void diverge(const std::string& how, int threads, int* live_objects);
void fail(const std::string& how, int thread, int blocks, int threads, int* live_objects);

}  // namespace selftest
