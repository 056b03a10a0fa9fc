// Rows of lists between torch and the code of the families: their checks, views of them, and how
// new ones are made, on the CPU and on CUDA.
#pragma once
#include <algorithm>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "csr.h"

namespace dhcl {

inline void check_range(const char* op, int64_t begin, int64_t end, int64_t rows) {
  check(0 <= begin && begin <= end && end <= rows, op, ": rows must lie in [0, ", rows, "] (got ",
        begin, " to ", end, ")");
}

inline void check_offsets(const char* op, const Tensor& offsets) {
  check_rank(op, "offsets", offsets, 1);
  check_int64(op, "offsets", offsets);
  check(offsets.size(0) >= 1, op, ": offsets must have one element more than rows (got 0)");
}

inline void check_length(const char* op, const char* name, const Tensor& t, int64_t length) {
  check_rank(op, name, t, 1);
  check(t.size(0) == length, op, ": ", name, " must have ", length, " elements (got ", t.size(0),
        ")");
}

// Offsets and columns of a CSR matrix, checked and contiguous.
struct Pattern {
  template <typename Device>
  Pattern(Device, const char* op, const Tensor& offsets_in, const Tensor& columns_in) {
    check_offsets(op, offsets_in);
    check_rank(op, "columns", columns_in, 1);
    check_int32(op, "columns", columns_in);
    offsets = torch::stable::contiguous(offsets_in);
    columns = torch::stable::contiguous(columns_in);
    check_lists<Device>(op, "offsets", offsets, nnz());
  }
  int64_t rows() const { return offsets.size(0) - 1; }
  int64_t nnz() const { return columns.size(0); }
  Tensor offsets, columns;
};

// With values beside the columns.
struct Matrix : Pattern {
  template <typename Device>
  Matrix(Device device, const char* op, const Tensor& offsets_in, const Tensor& columns_in,
         const Tensor& values_in)
      : Pattern(device, op, offsets_in, columns_in) {
    check_float(op, "values", values_in);
    check_length(op, "values", values_in, nnz());
    values = torch::stable::contiguous(values_in);
  }
  // Fills the pointers of a parameter struct.
  template <typename Params>
  void give_to(Params& p) const {
    p.offsets = int64_data(offsets);
    p.columns = int32_data(columns);
    p.values = float_data(values);
  }
  Tensor values;
};

// A pool lies in a tensor of int64; its entries are bits, not numbers.
inline uint64_t* pool_out(const Tensor& t) { return reinterpret_cast<uint64_t*>(int64_out(t)); }

// A CSR matrix as the CPU code reads it.
struct Csr {
  const int64_t* offsets;  // [N + 1]
  const int32_t* columns;  // [nnz], ascending in a row
  const float* values;     // [nnz] or null
  int64_t begin(int64_t row) const { return offsets[row]; }
  int64_t end(int64_t row) const { return offsets[row + 1]; }
  int64_t size(int64_t row) const { return offsets[row + 1] - offsets[row]; }
};

// ---- making rows on the CPU

// Scratch memory is as long as there are rows, so it is made once per thread and call, not once per
// task, and freed with the call.
template <typename Scratch, typename Make>
class Pool {
 public:
  explicit Pool(const Make& make) : make_(make) {}
  std::unique_ptr<Scratch> take() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        std::unique_ptr<Scratch> scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;
      }
    }
    return std::make_unique<Scratch>(make_());
  }
  void give(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(scratch));
  }

 private:
  const Make& make_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

// The part of a CSR matrix that one task makes.
struct Lines {
  std::vector<int32_t> columns;
  std::vector<float> values;
};

using NewRows = std::tuple<Tensor, Tensor, Tensor>;

// Makes the rows of range: row(scratch, i, lines) appends the entries of row i. work is an
// estimate, in elements touched.
template <typename Scratch, typename Make, typename Row>
NewRows make_rows(const Tensor& like, const LinesParams& range, bool valued, int64_t work,
                  const Make& make, const Row& row) {
  const Tensor offsets = new_int64(like, range.rows + 1);
  int64_t* starts = int64_out(offsets);
  const int64_t tasks = tasks_for(range.rows);
  std::vector<Lines> parts(tasks);
  Pool<Scratch, Make> pool(make);
  parallel_tasks(tasks, 1, work, [&](int64_t task) {
    std::unique_ptr<Scratch> scratch = pool.take();
    Lines& lines = parts[task];
    const int64_t stop = std::min((task + 1) * kRowsPerTask, range.rows);
    for (int64_t i = task * kRowsPerTask; i < stop; ++i) {
      row(*scratch, range.begin + i, lines);
      starts[i + 1] = static_cast<int64_t>(lines.columns.size());
    }
    pool.give(std::move(scratch));
  });
  // So far each task counts from its own start.
  std::vector<int64_t> first(tasks + 1, 0);
  for (int64_t task = 0; task < tasks; ++task)
    first[task + 1] = first[task] + static_cast<int64_t>(parts[task].columns.size());
  starts[0] = 0;
  for (int64_t i = 0; i < range.rows; ++i) starts[i + 1] += first[i / kRowsPerTask];
  const Tensor columns = new_int32(like, first[tasks]);
  const Tensor values = new_float(like, valued ? first[tasks] : 0);
  int32_t* column_out = int32_out(columns);
  float* value_out = float_out(values);
  parallel_tasks(tasks, 16, first[tasks], [&](int64_t task) {
    const Lines& lines = parts[task];
    std::copy(lines.columns.begin(), lines.columns.end(), column_out + first[task]);
    std::copy(lines.values.begin(), lines.values.end(), value_out + first[task]);
    parts[task] = Lines();
  });
  return {offsets, columns, values};
}

// ---- making rows on CUDA

#ifdef DHCL_CUDA
inline void scan_on(const CudaScope& scope, const Tensor& values) {
  const int64_t n = values.size(0) - 1;
  const Tensor tiles = new_int64(values, scan_tiles(n));
  launch_scan({int64_out(values), int64_out(tiles), n}, scope.stream());
  scope.check_launch();
}

// Has the kernels fill the lines of p, whose begin and rows say which, and with wide tables those
// that are left. Returns the number of entries, of which the pool has what fits.
template <auto kLaunch, typename Params>
int64_t fill_lines(const CudaScope& scope, const Tensor& like, Params& p, const Tensor& state) {
  // Memory for wide tables.
  constexpr int64_t kWideBytes = int64_t{1} << 28;
  int64_t counts[3] = {0, 0, 0};
  p.table.wide = nullptr;
  kLaunch(p, scope.stream());
  scope.check_launch();
  scope.read_back(counts, int64_data(state), 3);
  if (counts[2] > 0) {
    p.table.slices = std::min(counts[2], std::max(kWideBytes / (8 * p.num_rows), int64_t{1}));
    const Tensor wide = new_int32(like, p.table.slices * 2 * p.num_rows);
    p.table.wide = int32_out(wide);
    kLaunch(p, scope.stream());
    scope.check_launch();
    scope.read_back(counts, int64_data(state), 1);
  }
  return counts[0];
}

template <auto kLaunch, typename Params>
NewRows make_rows_cuda(const Tensor& like, Params p, bool valued) {
  // Room for an eighth more entries than a row of the last call had, so that a stage runs once;
  // rows have 20 to 100. It shows in time and memory only.
  static std::atomic<int64_t> last{56};
  const CudaScope scope(like);
  const int64_t rows = p.lines.rows;
  const Tensor offsets = new_int64(like, rows + 1), starts = new_int64(like, rows);
  const Tensor state = new_int64(like, 3), left = new_int64(like, 2 * rows);
  const int64_t guess = last;
  p.lines.capacity = rows * (guess + guess / 8 + 1);
  Tensor pool = new_int64(like, p.lines.capacity);
  p.lines.offsets = int64_out(offsets);
  p.lines.starts = int64_out(starts);
  p.lines.state = int64_out(state);
  p.lines.left = int64_out(left);
  int64_t entries = 0;
  while (rows > 0) {
    p.lines.pool = pool_out(pool);
    entries = fill_lines<kLaunch>(scope, like, p, state);
    if (entries <= p.lines.capacity) break;
    p.lines.capacity = entries;
    pool = new_int64(like, entries);
  }
  if (rows > 0) last = entries / rows + 1;
  scan_on(scope, offsets);
  const Tensor columns = new_int32(like, entries);
  const Tensor values = new_float(like, valued ? entries : 0);
  GatherParams g{};
  g.offsets = int64_data(offsets);
  g.starts = int64_data(starts);
  g.pool = pool_out(pool);
  g.columns = int32_out(columns);
  g.values = valued ? float_out(values) : nullptr;
  g.rows = rows;
  launch_gather_lines(g, scope.stream());
  scope.check_launch();
  return {offsets, columns, values};
}
#endif

// Makes rows [p.lines.begin, p.lines.begin + p.lines.rows) of a CSR matrix where the op runs.
template <typename Device, auto kRows, auto kLaunch, typename Params>
NewRows make_rows_on(const Tensor& like, const Params& p, bool valued) {
#ifdef DHCL_CUDA
  if constexpr (Device::kCuda) return make_rows_cuda<kLaunch>(like, p, valued);
#endif
  if constexpr (!Device::kCuda) return kRows(like, p);
}

}  // namespace dhcl
