// Sparse k-reciprocal Jaccard distance and DBSCAN on the CPU. What the stages promise is in
// jaccard.h. Each stage takes a range of rows, so that a caller can report progress and be
// interrupted between ranges; ranges do not show in the result.
#include "jaccard.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "common/cpu.h"

namespace dhcl {
namespace {

// ---- building blocks
// ------------------------------------------------------------------------------

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kNormColumns = 128;

int64_t tasks_for(int64_t rows) { return (rows + kRowsPerTask - 1) / kRowsPerTask; }

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

struct Csr {
  const int64_t* offsets;  // [N + 1]
  const int32_t* columns;  // [nnz], ascending in a row
  const float* values;     // [nnz] or null
  int64_t begin(int64_t row) const { return offsets[row]; }
  int64_t end(int64_t row) const { return offsets[row + 1]; }
  int64_t size(int64_t row) const { return offsets[row + 1] - offsets[row]; }
};

// The part of a CSR matrix that one task makes.
struct Lines {
  std::vector<int32_t> columns;
  std::vector<float> values;
};

// Makes rows [begin, end) of a CSR matrix: row(scratch, i, lines) appends the entries of row i.
// work is an estimate, in elements touched.
template <typename Scratch, typename Make, typename Row>
std::tuple<Tensor, Tensor, Tensor> make_rows(const Tensor& like, int64_t begin, int64_t end,
                                             int64_t work, const Make& make, const Row& row) {
  const int64_t rows = end - begin;
  Tensor offsets = torch::stable::new_empty(like, {rows + 1}, ScalarType::Long);
  int64_t* starts = offsets.mutable_data_ptr<int64_t>();
  const int64_t tasks = tasks_for(rows);
  std::vector<Lines> parts(tasks);
  Pool<Scratch, Make> pool(make);
  parallel_tasks(tasks, 1, work, [&](int64_t task) {
    std::unique_ptr<Scratch> scratch = pool.take();
    Lines& lines = parts[task];
    const int64_t stop = std::min((task + 1) * kRowsPerTask, rows);
    for (int64_t i = task * kRowsPerTask; i < stop; ++i) {
      row(*scratch, begin + i, lines);
      starts[i + 1] = static_cast<int64_t>(lines.columns.size());
    }
    pool.give(std::move(scratch));
  });
  // So far each task counts from its own start.
  std::vector<int64_t> first(tasks + 1, 0);
  for (int64_t task = 0; task < tasks; ++task)
    first[task + 1] = first[task] + static_cast<int64_t>(parts[task].columns.size());
  starts[0] = 0;
  for (int64_t i = 0; i < rows; ++i) starts[i + 1] += first[i / kRowsPerTask];
  Tensor columns = torch::stable::new_empty(like, {first[tasks]}, ScalarType::Int);
  const bool valued = tasks > 0 && !parts.empty() &&
                      std::any_of(parts.begin(), parts.end(),
                                  [](const Lines& lines) { return !lines.values.empty(); });
  Tensor values =
      torch::stable::new_empty(like, {valued ? first[tasks] : int64_t{0}}, ScalarType::Float);
  int32_t* column_out = columns.mutable_data_ptr<int32_t>();
  float* value_out = values.mutable_data_ptr<float>();
  parallel_tasks(tasks, 16, first[tasks], [&](int64_t task) {
    const Lines& lines = parts[task];
    std::copy(lines.columns.begin(), lines.columns.end(), column_out + first[task]);
    std::copy(lines.values.begin(), lines.values.end(), value_out + first[task]);
    parts[task] = Lines();
  });
  return {offsets, columns, values};
}

void check_int32(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32");
}

void check_float(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
}

void check_range(const char* op, int64_t begin, int64_t end, int64_t rows) {
  check(0 <= begin && begin <= end && end <= rows, op, ": rows must lie in [0, ", rows, "] (got ",
        begin, " to ", end, ")");
}

void check_ranks(const char* op, const Tensor& ranks) {
  check_rank(op, "ranks", ranks, 2);
  check_int32(op, "ranks", ranks);
}

const int32_t* int32_data(const Tensor& t) { return t.const_data_ptr<int32_t>(); }
const float* float_data(const Tensor& t) { return t.const_data_ptr<float>(); }

void check_csr(const char* op, const Tensor& offsets, const Tensor& columns) {
  check_rank(op, "offsets", offsets, 1);
  check_rank(op, "columns", columns, 1);
  check_int64(op, "offsets", offsets);
  check_int32(op, "columns", columns);
  check(offsets.size(0) >= 1, op, ": offsets must have one element more than rows (got 0)");
}

// ---- reciprocal neighbours
// ------------------------------------------------------------------------

// Where row id stands in its own neighbour's list; -1 if nowhere.
DHCL_CLONES int32_t find(const int32_t* list, int64_t width, int32_t id) {
  int32_t position = -1;
  for (int32_t q = 0; q < static_cast<int32_t>(width); ++q)
    position = list[q] == id ? std::max(position, q) : position;
  return position;
}

Tensor reciprocal_positions_cpu(const Tensor& ranks_in) {
  constexpr const char* op = "reciprocal_positions";
  check_ranks(op, ranks_in);
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  const int64_t n = ranks.size(0), width = ranks.size(1);
  check(width <= std::numeric_limits<int16_t>::max(), op, ": ranks must have at most 32767 columns",
        " (got ", width, ")");
  Tensor positions = torch::stable::new_empty(ranks, {n, width}, ScalarType::Short);
  const int32_t* list = int32_data(ranks);
  int16_t* out = positions.mutable_data_ptr<int16_t>();
  parallel_tasks(tasks_for(n), 1, n * width * width, [&](int64_t task) {
    const int64_t stop = std::min((task + 1) * kRowsPerTask, n);
    for (int64_t i = task * kRowsPerTask; i < stop; ++i) {
      for (int64_t p = 0; p < width; ++p) {
        const int32_t j = list[i * width + p];
        check(j >= 0 && j < n, op, ": ranks must be in [0, ", n, ") (got ", j, " in row ", i, ")");
        out[i * width + p] = static_cast<int16_t>(
            find(list + static_cast<int64_t>(j) * width, width, static_cast<int32_t>(i)));
      }
    }
  });
  return positions;
}

struct Marks {
  std::vector<uint8_t> mark;  // [N], all zero between rows
};

std::tuple<Tensor, Tensor> k_reciprocal_cpu(const Tensor& ranks_in, const Tensor& positions_in,
                                            int64_t k, int64_t half, int64_t begin, int64_t end) {
  constexpr const char* op = "k_reciprocal";
  check_ranks(op, ranks_in);
  check(positions_in.scalar_type() == ScalarType::Short && positions_in.dim() == 2 &&
            positions_in.size(0) == ranks_in.size(0) && positions_in.size(1) == ranks_in.size(1),
        op, ": positions must be int16, of the shape of ranks");
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  const Tensor positions = torch::stable::contiguous(positions_in);
  const int64_t n = ranks.size(0), width = ranks.size(1);
  check(k <= width && half <= width, op, ": k and half must be at most ", width, " (got ", k,
        " and ", half, ")");
  check_range(op, begin, end, n);
  const int32_t* list = int32_data(ranks);
  const int16_t* back = positions.const_data_ptr<int16_t>();
  const auto make = [n] { return Marks{std::vector<uint8_t>(n, 0)}; };
  const auto row = [&](Marks& scratch, int64_t i, Lines& lines) {
    uint8_t* mark = scratch.mark.data();
    std::vector<int32_t>& out = lines.columns;
    const size_t start = out.size();
    for (int64_t p = 0; p < k; ++p) {
      const int16_t q = back[i * width + p];
      if (q < 0 || q >= k) continue;
      const int32_t j = list[i * width + p];
      if (mark[j] == 0) out.push_back(j);
      mark[j] = 1;
    }
    const size_t members = out.size();
    for (size_t m = start; m < members; ++m) {
      const int64_t c = out[m];
      const int32_t* near = list + c * width;
      const int16_t* near_back = back + c * width;
      int64_t size = 0, shared = 0;
      for (int64_t p = 0; p < half; ++p) {
        const bool mutual = near_back[p] >= 0 && near_back[p] < half;
        size += mutual;
        shared += mutual && mark[near[p]] == 1;
      }
      // More than two thirds, as an integer test: equal to the published one in doubles.
      if (3 * shared <= 2 * size) continue;
      for (int64_t p = 0; p < half; ++p) {
        if (near_back[p] < 0 || near_back[p] >= half || mark[near[p]] != 0) continue;
        mark[near[p]] = 2;
        out.push_back(near[p]);
      }
    }
    for (size_t m = start; m < out.size(); ++m) mark[out[m]] = 0;
    std::sort(out.begin() + static_cast<int64_t>(start), out.end());
  };
  auto [offsets, columns, values] =
      make_rows<Marks>(ranks, begin, end, (end - begin) * k * half, make, row);
  return {offsets, columns};
}

// ---- weights
// --------------------------------------------------------------------------------------

DHCL_CLONES float dot(const float* a, const float* b, int64_t d) {
  alignas(64) float columns[kNormColumns] = {};
  const int64_t whole = d / kNormColumns * kNormColumns;
  for (int64_t j = 0; j < whole; j += kNormColumns)
    for (int64_t c = 0; c < kNormColumns; ++c) columns[c] += a[j + c] * b[j + c];
  for (int64_t c = 0; c < d - whole; ++c) columns[c] += a[whole + c] * b[whole + c];
  for (int64_t half = kNormColumns / 2; half > 0; half /= 2)
    for (int64_t c = 0; c < half; ++c) columns[c] += columns[c + half];
  return columns[0];
}

// The dot products of row begin + r with the rows its line of the CSR matrix names. Where the
// neighbour list holds the column, its similarity is taken from there.
Tensor pair_dots_cpu(const Tensor& features_in, const Tensor& ranks_in,
                     const std::optional<Tensor>& similarities_in, const Tensor& offsets_in,
                     const Tensor& columns_in, int64_t begin) {
  constexpr const char* op = "pair_dots";
  check_rank(op, "features", features_in, 2);
  check_float(op, "features", features_in);
  check_ranks(op, ranks_in);
  check_csr(op, offsets_in, columns_in);
  const Tensor features = torch::stable::contiguous(features_in);
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  std::optional<Tensor> similarities;
  if (similarities_in.has_value()) {
    check_float(op, "similarities", *similarities_in);
    check(similarities_in->dim() == 2 && similarities_in->size(0) == ranks.size(0) &&
              similarities_in->size(1) == ranks.size(1),
          op, ": similarities must have the shape of ranks");
    similarities = torch::stable::contiguous(*similarities_in);
  }
  const int64_t d = features.size(1), width = ranks.size(1), rows = offsets.size(0) - 1;
  check_range(op, begin, begin + rows, features.size(0));
  Tensor out = torch::stable::new_empty(features, {columns.size(0)});
  const float* x = float_data(features);
  const float* similarity = similarities.has_value() ? float_data(*similarities) : nullptr;
  const int32_t* list = int32_data(ranks);
  const Csr csr{int64_data(offsets), int32_data(columns), nullptr};
  float* result = out.mutable_data_ptr<float>();
  const int64_t work = columns.size(0) * (d + width);
  parallel_tasks(tasks_for(rows), 1, work, [&](int64_t task) {
    const int64_t stop = std::min((task + 1) * kRowsPerTask, rows);
    for (int64_t r = task * kRowsPerTask; r < stop; ++r) {
      const int64_t i = begin + r;
      for (int64_t e = csr.begin(r); e < csr.end(r); ++e) {
        const int64_t c = csr.columns[e];
        const int32_t p =
            similarity == nullptr ? -1 : find(list + i * width, width, csr.columns[e]);
        result[e] = p >= 0 ? similarity[i * width + p] : dot(x + i * d, x + c * d, d);
      }
    }
  });
  return out;
}

Tensor softmax_rows_cpu(const Tensor& offsets_in, const Tensor& logits_in) {
  constexpr const char* op = "softmax_rows";
  check_rank(op, "offsets", offsets_in, 1);
  check_int64(op, "offsets", offsets_in);
  check_rank(op, "logits", logits_in, 1);
  check_float(op, "logits", logits_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor logits = torch::stable::contiguous(logits_in);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0)});
  const int64_t rows = offsets.size(0) - 1;
  const int64_t* start = int64_data(offsets);
  const float* x = float_data(logits);
  float* weights = out.mutable_data_ptr<float>();
  parallel_tasks(tasks_for(rows), 1, 16 * logits.size(0), [&](int64_t task) {
    thread_local std::vector<double> exps;
    const int64_t stop = std::min((task + 1) * kRowsPerTask, rows);
    for (int64_t r = task * kRowsPerTask; r < stop; ++r) {
      const int64_t begin = start[r], size = start[r + 1] - begin;
      if (size == 0) continue;
      exps.resize(size);
      const double top = *std::max_element(x + begin, x + begin + size);
      double sum = 0.0;
      for (int64_t e = 0; e < size; ++e) {
        exps[e] = std::exp(static_cast<double>(x[begin + e]) - top);
        sum += exps[e];
      }
      for (int64_t e = 0; e < size; ++e) weights[begin + e] = static_cast<float>(exps[e] / sum);
    }
  });
  return out;
}

// ---- query expansion
// --------------------------------------------------------------------------------

struct Sums {
  std::vector<int32_t> keys;  // a hash table of columns, -1 where free
  std::vector<float> sums;
  std::vector<uint64_t> found;  // column << 32 | place in the table
};

std::tuple<Tensor, Tensor, Tensor> query_expand_cpu(const Tensor& ranks_in,
                                                    const Tensor& offsets_in,
                                                    const Tensor& columns_in,
                                                    const Tensor& values_in, int64_t k2,
                                                    int64_t begin, int64_t end) {
  constexpr const char* op = "query_expand";
  check_ranks(op, ranks_in);
  check_csr(op, offsets_in, columns_in);
  check_float(op, "values", values_in);
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  const Tensor values = torch::stable::contiguous(values_in);
  const int64_t width = ranks.size(1);
  check(k2 >= 1 && k2 <= width, op, ": k2 must be in [1, ", width, "] (got ", k2, ")");
  check_range(op, begin, end, ranks.size(0));
  const int32_t* list = int32_data(ranks);
  const Csr v{int64_data(offsets), int32_data(columns), float_data(values)};
  const float count = static_cast<float>(k2);
  const auto make = [] { return Sums(); };
  const auto row = [&](Sums& s, int64_t i, Lines& lines) {
    const int32_t* near = list + i * width;
    int64_t entries = 0;
    for (int64_t q = 0; q < k2; ++q) entries += v.size(near[q]);
    if (static_cast<int64_t>(s.keys.size()) < 2 * entries) {
      size_t capacity = 256;
      while (static_cast<int64_t>(capacity) < 2 * entries) capacity *= 2;
      s.keys.assign(capacity, -1);
      s.sums.assign(capacity, 0.0f);
    }
    const uint32_t mask = static_cast<uint32_t>(s.keys.size()) - 1;
    s.found.clear();
    for (int64_t q = 0; q < k2; ++q) {
      for (int64_t e = v.begin(near[q]); e < v.end(near[q]); ++e) {
        const int32_t c = v.columns[e];
        uint32_t place = static_cast<uint32_t>(c) * 2654435769u >> 7 & mask;
        while (s.keys[place] != c && s.keys[place] >= 0) place = (place + 1) & mask;
        if (s.keys[place] < 0) {
          s.keys[place] = c;
          s.sums[place] = v.values[e];
          s.found.push_back(static_cast<uint64_t>(c) << 32 | place);
        } else {
          s.sums[place] += v.values[e];
        }
      }
    }
    std::sort(s.found.begin(), s.found.end());
    for (const uint64_t f : s.found) {
      const uint32_t place = static_cast<uint32_t>(f);
      lines.columns.push_back(s.keys[place]);
      lines.values.push_back(s.sums[place] / count);
      s.keys[place] = -1;
    }
  };
  return make_rows<Sums>(ranks, begin, end, (end - begin) * k2 * 64, make, row);
}

// ---- inverted index
// -----------------------------------------------------------------------------------

int64_t longest_row(const int64_t* offsets, int64_t rows) {
  int64_t longest = 0;
  for (int64_t i = 0; i < rows; ++i) longest = std::max(longest, offsets[i + 1] - offsets[i]);
  return longest;
}

// order: the entries of each row, rarest column first (then by column), as positions in the row.
// prefix: the length of the shortest head of that order after which less than the needed weight
// remains. Two rows that share the needed weight share a column that lies in both heads.
// lists: the rows of each column; first those that have it in their head (up to split), then the
// rest, both ascending.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inverted_index_cpu(
    const Tensor& offsets_in, const Tensor& columns_in, const Tensor& values_in, double eps) {
  constexpr const char* op = "inverted_index";
  check_csr(op, offsets_in, columns_in);
  check_float(op, "values", values_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  const Tensor values = torch::stable::contiguous(values_in);
  const int64_t n = offsets.size(0) - 1, nnz = columns.size(0);
  const Csr q{int64_data(offsets), int32_data(columns), float_data(values)};
  Tensor order = torch::stable::new_empty(columns, {nnz}, ScalarType::Int);
  Tensor prefix = torch::stable::new_empty(columns, {n}, ScalarType::Int);
  Tensor list_offsets = torch::stable::new_empty(columns, {n + 1}, ScalarType::Long);
  Tensor list_split = torch::stable::new_empty(columns, {n}, ScalarType::Long);
  Tensor list_rows = torch::stable::new_empty(columns, {nnz}, ScalarType::Int);
  Tensor list_values = torch::stable::new_empty(columns, {nnz}, ScalarType::Float);
  int32_t* order_out = order.mutable_data_ptr<int32_t>();
  int32_t* prefix_out = prefix.mutable_data_ptr<int32_t>();
  int64_t* starts = list_offsets.mutable_data_ptr<int64_t>();
  int64_t* split = list_split.mutable_data_ptr<int64_t>();
  int32_t* row_out = list_rows.mutable_data_ptr<int32_t>();
  float* value_out = list_values.mutable_data_ptr<float>();

  std::fill_n(starts, n + 1, 0);
  for (int64_t e = 0; e < nnz; ++e) {
    const int64_t c = q.columns[e];
    check(c >= 0 && c < n, op, ": columns must be in [0, ", n, ") (got ", c, ")");
    ++starts[c + 1];
  }
  std::partial_sum(starts, starts + n + 1, starts);

  const double needed = shared_weight_needed(static_cast<float>(eps), longest_row(q.offsets, n));
  const int64_t needed_fixed = static_cast<int64_t>(needed * kFixedPoint);
  std::vector<uint8_t> in_prefix(nnz, 0);
  parallel_tasks(tasks_for(n), 1, 8 * nnz, [&](int64_t task) {
    thread_local std::vector<uint64_t> keys;
    const int64_t stop = std::min((task + 1) * kRowsPerTask, n);
    for (int64_t i = task * kRowsPerTask; i < stop; ++i) {
      const int64_t begin = q.begin(i), size = q.size(i);
      keys.resize(size);
      int64_t rest = 0;
      for (int64_t e = 0; e < size; ++e) {
        const int64_t c = q.columns[begin + e];
        // Positions in the row ascend with the column, so they break ties as columns do.
        keys[e] = static_cast<uint64_t>(starts[c + 1] - starts[c]) << 32 | static_cast<uint64_t>(e);
        rest += static_cast<int64_t>(static_cast<double>(q.values[begin + e]) * kFixedPoint);
      }
      std::sort(keys.begin(), keys.end());
      int64_t head = 0;
      for (int64_t e = 0; e < size; ++e) {
        const int64_t place = begin + static_cast<int64_t>(keys[e] & 0xffffffffu);
        order_out[begin + e] = static_cast<int32_t>(place - begin);
        if (rest < needed_fixed) continue;
        rest -= static_cast<int64_t>(static_cast<double>(q.values[place]) * kFixedPoint);
        in_prefix[place] = 1;
        ++head;
      }
      prefix_out[i] = static_cast<int32_t>(head);
    }
  });

  std::copy_n(starts, n, split);
  for (int64_t e = 0; e < nnz; ++e) split[q.columns[e]] += in_prefix[e];
  std::vector<int64_t> head(starts, starts + n), tail(split, split + n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t e = q.begin(i); e < q.end(i); ++e) {
      const int64_t place = in_prefix[e] ? head[q.columns[e]]++ : tail[q.columns[e]]++;
      row_out[place] = static_cast<int32_t>(i);
      value_out[place] = q.values[e];
    }
  }
  return {order, prefix, list_offsets, list_split, list_rows, list_values};
}

struct Lists {
  const int64_t* offsets;  // [N + 1]
  const int64_t* split;    // [N]
  const int32_t* rows;     // [nnz]
  const float* values;     // [nnz]
};

// ---- join
// ---------------------------------------------------------------------------------------------

struct JoinScratch {
  std::vector<float> sums;     // [N] by row, kAbsent between rows
  std::vector<float> own;      // [N] by column, zero between rows
  std::vector<int32_t> found;  // [N] candidates
  std::vector<int64_t> cost;   // what the lists from an entry on cost
  std::vector<std::pair<int32_t, float>> kept;
};

// Adds min(v, w) for the rows after i of a piece of a list. Rows ascend, so it is walked backwards.
inline void add_after(const Lists& lists, int64_t begin, int64_t end, int32_t i, float v,
                      float* sums) {
  for (int64_t r = end - 1; r >= begin && lists.rows[r] > i; --r)
    sums[lists.rows[r]] += std::min(v, lists.values[r]);
}

inline float jaccard(float t) {
  const float distance = 1.0f - t / (2.0f - t);
  return distance < 0.0f ? 0.0f : distance;
}

// The sum of minima over the shared columns, ascending. What is not shared adds zero, which changes
// no bit.
inline float shared_weight(const Csr& q, int64_t j, const float* own) {
  float t = 0.0f;
  for (int64_t e = q.begin(j); e < q.end(j); ++e) t += std::min(own[q.columns[e]], q.values[e]);
  return t;
}

// Four rows at once: a sum has to wait for each addition, four of them wait together.
inline void shared_weight4(const Csr& q, const int32_t* rows, const float* own, float* t) {
  const int64_t b0 = q.begin(rows[0]), b1 = q.begin(rows[1]), b2 = q.begin(rows[2]),
                b3 = q.begin(rows[3]);
  const int64_t s0 = q.size(rows[0]), s1 = q.size(rows[1]), s2 = q.size(rows[2]),
                s3 = q.size(rows[3]);
  const int64_t common = std::min(std::min(s0, s1), std::min(s2, s3));
  float t0 = 0.0f, t1 = 0.0f, t2 = 0.0f, t3 = 0.0f;
  for (int64_t e = 0; e < common; ++e) {
    t0 += std::min(own[q.columns[b0 + e]], q.values[b0 + e]);
    t1 += std::min(own[q.columns[b1 + e]], q.values[b1 + e]);
    t2 += std::min(own[q.columns[b2 + e]], q.values[b2 + e]);
    t3 += std::min(own[q.columns[b3 + e]], q.values[b3 + e]);
  }
  for (int64_t e = common; e < s0; ++e) t0 += std::min(own[q.columns[b0 + e]], q.values[b0 + e]);
  for (int64_t e = common; e < s1; ++e) t1 += std::min(own[q.columns[b1 + e]], q.values[b1 + e]);
  for (int64_t e = common; e < s2; ++e) t2 += std::min(own[q.columns[b2 + e]], q.values[b2 + e]);
  for (int64_t e = common; e < s3; ++e) t3 += std::min(own[q.columns[b3 + e]], q.values[b3 + e]);
  t[0] = t0;
  t[1] = t1;
  t[2] = t2;
  t[3] = t3;
}

// Rows [begin, end) of the upper triangle (diagonal included) of the eps-graph. For each row:
//  1. walk the columns of the head and make every later row that has the column in its own head a
//     candidate; add up the minima of candidates, also over the columns behind the head;
//  2. leave the remaining, longest lists out as soon as they cost more than looking at the
//     candidates that can still reach the needed weight: this is what a hub cannot hurt;
//  3. sum the survivors again, exactly and in ascending column order.
std::tuple<Tensor, Tensor, Tensor> jaccard_join_cpu(
    const Tensor& offsets_in, const Tensor& columns_in, const Tensor& values_in,
    const Tensor& order_in, const Tensor& prefix_in, const Tensor& list_offsets_in,
    const Tensor& list_split_in, const Tensor& list_rows_in, const Tensor& list_values_in,
    double eps, int64_t begin, int64_t end) {
  constexpr const char* op = "jaccard_join";
  check_csr(op, offsets_in, columns_in);
  check_float(op, "values", values_in);
  check_int32(op, "order", order_in);
  check_int32(op, "prefix", prefix_in);
  check_int64(op, "list_offsets", list_offsets_in);
  check_int64(op, "list_split", list_split_in);
  check_int32(op, "list_rows", list_rows_in);
  check_float(op, "list_values", list_values_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  const Tensor values = torch::stable::contiguous(values_in);
  const Tensor order = torch::stable::contiguous(order_in);
  const Tensor prefix = torch::stable::contiguous(prefix_in);
  const Tensor list_offsets = torch::stable::contiguous(list_offsets_in);
  const Tensor list_split = torch::stable::contiguous(list_split_in);
  const Tensor list_rows = torch::stable::contiguous(list_rows_in);
  const Tensor list_values = torch::stable::contiguous(list_values_in);
  const int64_t n = offsets.size(0) - 1;
  check_range(op, begin, end, n);
  const Csr q{int64_data(offsets), int32_data(columns), float_data(values)};
  const Lists lists{int64_data(list_offsets), int64_data(list_split), int32_data(list_rows),
                    float_data(list_values)};
  const int32_t* order_of = int32_data(order);
  const int32_t* prefix_of = int32_data(prefix);
  const float limit = static_cast<float>(eps);
  const float needed = static_cast<float>(shared_weight_needed(limit, longest_row(q.offsets, n)));
  const int64_t mean_row = n == 0 ? 0 : q.offsets[n] / n + 1;

  const auto make = [n] {
    JoinScratch s;
    s.sums.assign(n, kAbsent);
    s.own.assign(n, 0.0f);
    s.found.resize(n + 1);
    return s;
  };
  const auto row = [&](JoinScratch& s, int64_t i, Lines& out) {
    const int64_t first = q.begin(i), size = q.size(i);
    const int32_t head = prefix_of[i];
    const int32_t self = static_cast<int32_t>(i);
    float* sums = s.sums.data();
    int32_t* found = s.found.data();
    int64_t count = 0;
    // Of a list's rows about this share comes after row i.
    const double share = static_cast<double>(n - i) / static_cast<double>(n);
    s.cost.resize(size + 1);
    s.cost[size] = 0;
    float rest = 0.0f;
    for (int64_t k = size - 1; k >= 0; --k) {
      const int64_t c = q.columns[first + order_of[first + k]];
      s.cost[k] = s.cost[k + 1] + lists.offsets[c + 1] - lists.offsets[c];
    }
    for (int64_t e = first; e < first + size; ++e) {
      s.own[q.columns[e]] = q.values[e];
      rest += q.values[e];
    }
    int64_t k = 0;
    for (; k < size; ++k) {
      const int64_t e = first + order_of[first + k];
      const int64_t c = q.columns[e];
      const float v = q.values[e];
      const int64_t start = lists.offsets[c], split = lists.split[c], stop = lists.offsets[c + 1];
      if (k < head) {
        for (int64_t r = split - 1; r >= start && lists.rows[r] > self; --r) {
          const int32_t j = lists.rows[r];
          const float sum = sums[j];
          found[count] = j;
          count += sum < 0.0f;
          sums[j] = std::max(sum, 0.0f) + std::min(v, lists.values[r]);
        }
      } else {
        const double ahead = share * static_cast<double>(s.cost[k]);
        if (ahead > static_cast<double>(count)) {
          // Candidates that can no longer reach the needed weight are dropped, then what is left
          // decides.
          int64_t kept = 0;
          for (int64_t m = 0; m < count; ++m) {
            const int32_t j = found[m];
            if (sums[j] + rest >= needed)
              found[kept++] = j;
            else
              sums[j] = kAbsent;
          }
          count = kept;
          if (ahead > static_cast<double>(count * mean_row)) break;
        }
        add_after(lists, start, split, self, v, sums);
      }
      add_after(lists, split, stop, self, v, sums);
      rest -= v;
    }
    // The remaining weight as a difference of floats; the margin in the needed weight covers it.
    if (k == size) rest = 0.0f;
    s.kept.clear();
    int64_t survivors = 0;
    for (int64_t m = 0; m < count; ++m) {
      const int32_t j = found[m];
      if (sums[j] + rest >= needed) found[survivors++] = j;
      sums[j] = kAbsent;
    }
    found[survivors++] = self;
    const auto keep = [&](int32_t j, float t) {
      const float distance = jaccard(t);
      if (distance <= limit) s.kept.emplace_back(j, distance);
    };
    int64_t m = 0;
    for (; m + 4 <= survivors; m += 4) {
      float t[4];
      shared_weight4(q, found + m, s.own.data(), t);
      for (int64_t lane = 0; lane < 4; ++lane) keep(found[m + lane], t[lane]);
    }
    for (; m < survivors; ++m) keep(found[m], shared_weight(q, found[m], s.own.data()));
    for (int64_t e = first; e < first + size; ++e) s.own[q.columns[e]] = 0.0f;
    std::sort(s.kept.begin(), s.kept.end());
    for (const auto& [j, distance] : s.kept) {
      out.columns.push_back(j);
      out.values.push_back(distance);
    }
  };
  return make_rows<JoinScratch>(columns, begin, end, (end - begin) * mean_row * 16, make, row);
}

// The full symmetric matrix from its upper triangle: int64 columns, ascending.
std::tuple<Tensor, Tensor, Tensor> mirror_csr_cpu(const Tensor& offsets_in,
                                                  const Tensor& columns_in,
                                                  const Tensor& values_in) {
  constexpr const char* op = "mirror_csr";
  check_csr(op, offsets_in, columns_in);
  check_float(op, "values", values_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  const Tensor values = torch::stable::contiguous(values_in);
  const int64_t n = offsets.size(0) - 1;
  const Csr upper{int64_data(offsets), int32_data(columns), float_data(values)};
  Tensor full_offsets = torch::stable::new_empty(offsets, {n + 1}, ScalarType::Long);
  int64_t* starts = full_offsets.mutable_data_ptr<int64_t>();
  std::fill_n(starts, n + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    starts[i + 1] += upper.size(i);
    for (int64_t e = upper.begin(i); e < upper.end(i); ++e) {
      const int64_t j = upper.columns[e];
      check(j >= i && j < n, op, ": columns must be in [row, ", n, ") (got ", j, " in row ", i,
            ")");
      starts[j + 1] += j != i;
    }
  }
  std::partial_sum(starts, starts + n + 1, starts);
  Tensor full_columns = torch::stable::new_empty(offsets, {starts[n]}, ScalarType::Long);
  Tensor full_values = torch::stable::new_empty(offsets, {starts[n]}, ScalarType::Float);
  int64_t* column_out = full_columns.mutable_data_ptr<int64_t>();
  float* value_out = full_values.mutable_data_ptr<float>();
  std::vector<int64_t> next(starts, starts + n);
  // When row i comes, all that mirrors into it, from rows before it, is in place.
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t e = upper.begin(i); e < upper.end(i); ++e) {
      const int64_t j = upper.columns[e];
      column_out[next[i]] = j;
      value_out[next[i]++] = upper.values[e];
      if (j == i) continue;
      column_out[next[j]] = i;
      value_out[next[j]++] = upper.values[e];
    }
  }
  return {full_offsets, full_columns, full_values};
}

// Rows [begin, end) of the dense distance matrix, through the plain index: columns ascend, so the
// sums have their order without further care.
Tensor jaccard_rows_cpu(const Tensor& offsets_in, const Tensor& columns_in, const Tensor& values_in,
                        const Tensor& list_offsets_in, const Tensor& list_rows_in,
                        const Tensor& list_values_in, int64_t begin, int64_t end) {
  constexpr const char* op = "jaccard_rows";
  check_csr(op, offsets_in, columns_in);
  check_float(op, "values", values_in);
  check_int64(op, "list_offsets", list_offsets_in);
  check_int32(op, "list_rows", list_rows_in);
  check_float(op, "list_values", list_values_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  const Tensor values = torch::stable::contiguous(values_in);
  const Tensor list_offsets = torch::stable::contiguous(list_offsets_in);
  const Tensor list_rows = torch::stable::contiguous(list_rows_in);
  const Tensor list_values = torch::stable::contiguous(list_values_in);
  const int64_t n = offsets.size(0) - 1;
  check_range(op, begin, end, n);
  const Csr q{int64_data(offsets), int32_data(columns), float_data(values)};
  const Lists lists{int64_data(list_offsets), nullptr, int32_data(list_rows),
                    float_data(list_values)};
  Tensor out = torch::stable::new_empty(values, {end - begin, n});
  float* distances = out.mutable_data_ptr<float>();
  parallel_tasks(end - begin, 1, (end - begin) * n, [&](int64_t r) {
    float* sums = distances + r * n;
    std::fill_n(sums, n, 0.0f);
    for (int64_t e = q.begin(begin + r); e < q.end(begin + r); ++e) {
      const int64_t c = q.columns[e];
      for (int64_t k = lists.offsets[c]; k < lists.offsets[c + 1]; ++k)
        sums[lists.rows[k]] += std::min(q.values[e], lists.values[k]);
    }
    for (int64_t j = 0; j < n; ++j) sums[j] = jaccard(sums[j]);
  });
  return out;
}

// ---- DBSCAN
// -------------------------------------------------------------------------------------------

// Clusters are numbered by their smallest core row, and a border row goes to the lowest of the
// clusters it touches: what scikit-learn's depth-first search over ascending rows comes to.
Tensor dbscan_cpu(const Tensor& offsets_in, const Tensor& columns_in, const Tensor& values_in,
                  double eps, int64_t min_samples) {
  constexpr const char* op = "dbscan";
  check_rank(op, "offsets", offsets_in, 1);
  check_int64(op, "offsets", offsets_in);
  check_int64(op, "columns", columns_in);
  check_float(op, "values", values_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  const Tensor values = torch::stable::contiguous(values_in);
  const int64_t n = offsets.size(0) - 1;
  const int64_t* start = int64_data(offsets);
  const int64_t* neighbour = int64_data(columns);
  const float* distance = float_data(values);
  const float limit = static_cast<float>(eps);
  Tensor out = torch::stable::new_empty(offsets, {n}, ScalarType::Long);
  int64_t* labels = out.mutable_data_ptr<int64_t>();

  std::vector<uint8_t> core(n, 0);
  parallel_tasks(tasks_for(n), 16, columns.size(0), [&](int64_t task) {
    const int64_t stop = std::min((task + 1) * kRowsPerTask, n);
    for (int64_t i = task * kRowsPerTask; i < stop; ++i) {
      int64_t degree = 0;
      for (int64_t e = start[i]; e < start[i + 1]; ++e) {
        check(neighbour[e] >= 0 && neighbour[e] < n, op, ": columns must be in [0, ", n, ") (got ",
              neighbour[e], " in row ", i, ")");
        degree += distance[e] <= limit;
      }
      core[i] = degree >= min_samples;
    }
  });
  // The root of a component is its smallest core row.
  std::vector<int64_t> parent(n);
  std::iota(parent.begin(), parent.end(), 0);
  const auto find_root = [&parent](int64_t i) {
    while (parent[i] != i) i = parent[i] = parent[parent[i]];
    return i;
  };
  for (int64_t i = 0; i < n; ++i) {
    if (!core[i]) continue;
    for (int64_t e = start[i]; e < start[i + 1] && neighbour[e] < i; ++e) {
      if (distance[e] > limit || !core[neighbour[e]]) continue;
      const int64_t a = find_root(i), b = find_root(neighbour[e]);
      parent[std::max(a, b)] = std::min(a, b);
    }
  }
  int64_t clusters = 0;
  for (int64_t i = 0; i < n; ++i) {
    labels[i] = -1;
    if (!core[i]) continue;
    const int64_t root = find_root(i);
    labels[i] = root == i ? clusters++ : labels[root];
  }
  parallel_tasks(tasks_for(n), 16, columns.size(0), [&](int64_t task) {
    const int64_t stop = std::min((task + 1) * kRowsPerTask, n);
    for (int64_t i = task * kRowsPerTask; i < stop; ++i) {
      if (core[i]) continue;
      int64_t lowest = -1;
      for (int64_t e = start[i]; e < start[i + 1]; ++e) {
        if (distance[e] > limit || !core[neighbour[e]]) continue;
        const int64_t label = labels[neighbour[e]];
        lowest = lowest < 0 ? label : std::min(lowest, label);
      }
      labels[i] = lowest;
    }
  });
  return out;
}

// ---- CUDA
// ------------------------------------------------------------------------------------------------

#ifdef DHCL_CUDA
Tensor int64s(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n}, ScalarType::Long);
}
int64_t* int64_out(const Tensor& t) { return t.mutable_data_ptr<int64_t>(); }
// A pool lies in a tensor of int64; its entries are bits, not numbers.
uint64_t* pool_out(const Tensor& t) { return reinterpret_cast<uint64_t*>(int64_out(t)); }

// A CSR matrix, checked and contiguous.
struct Matrix {
  Matrix(const char* op, const Tensor& offsets_in, const Tensor& columns_in,
         const Tensor& values_in) {
    check_csr(op, offsets_in, columns_in);
    check_float(op, "values", values_in);
    offsets = torch::stable::contiguous(offsets_in);
    columns = torch::stable::contiguous(columns_in);
    values = torch::stable::contiguous(values_in);
  }
  int64_t rows() const { return offsets.size(0) - 1; }
  int64_t nnz() const { return columns.size(0); }
  Tensor offsets, columns, values;
};

void scan_on(const CudaScope& scope, const Tensor& values) {
  const int64_t n = values.size(0) - 1;
  const Tensor tiles = int64s(values, scan_tiles(n));
  launch_scan({int64_out(values), int64_out(tiles), n}, scope.stream());
  scope.check_launch();
}

// Makes rows [begin, end) of a CSR matrix; launch fills the lines of p.
template <typename Params, typename Launch>
std::tuple<Tensor, Tensor, Tensor> make_rows_cuda(const Tensor& like, Params p, int64_t begin,
                                                  int64_t end, int64_t cells, bool valued,
                                                  const Launch& launch) {
  // A first guess; rows have 20 to 100 entries.
  constexpr int64_t kEntriesPerRow = 64;
  // Memory for wide tables.
  constexpr int64_t kWideBytes = int64_t{1} << 28;
  const CudaScope scope(like);
  const int64_t rows = end - begin;
  const Tensor offsets = int64s(like, rows + 1), starts = int64s(like, rows);
  const Tensor state = int64s(like, 2);
  int64_t capacity = rows * kEntriesPerRow;
  Tensor pool = int64s(like, capacity);
  int64_t counts[2] = {0, 0};
  while (rows > 0) {
    p.lines = {int64_out(offsets),
               int64_out(starts),
               pool_out(pool),
               int64_out(state),
               capacity,
               begin,
               rows};
    p.table = {nullptr, 0, cells};
    launch(p, scope.stream());
    scope.check_launch();
    scope.read_back(counts, int64_data(state), 2);
    if (counts[1] > 0) {
      p.table.slices = std::min(counts[1], std::max(kWideBytes / (8 * p.num_rows), int64_t{1}));
      const Tensor wide =
          torch::stable::new_empty(like, {p.table.slices * 2 * p.num_rows}, ScalarType::Int);
      p.table.wide = wide.mutable_data_ptr<int32_t>();
      launch(p, scope.stream());
      scope.check_launch();
      scope.read_back(counts, int64_data(state), 2);
    }
    if (counts[0] <= capacity) break;
    capacity = counts[0];
    pool = int64s(like, capacity);
  }
  scan_on(scope, offsets);
  Tensor columns = torch::stable::new_empty(like, {counts[0]}, ScalarType::Int);
  Tensor values =
      torch::stable::new_empty(like, {valued ? counts[0] : int64_t{0}}, ScalarType::Float);
  GatherParams g{};
  g.offsets = int64_data(offsets);
  g.starts = int64_data(starts);
  g.pool = pool_out(pool);
  g.columns = columns.mutable_data_ptr<int32_t>();
  g.values = valued ? values.mutable_data_ptr<float>() : nullptr;
  g.rows = rows;
  launch_gather_lines(g, scope.stream());
  scope.check_launch();
  return {offsets, columns, values};
}

Tensor reciprocal_positions_cuda(const Tensor& ranks_in) {
  constexpr const char* op = "reciprocal_positions";
  check_ranks(op, ranks_in);
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  const int64_t n = ranks.size(0), width = ranks.size(1);
  check(width <= std::numeric_limits<int16_t>::max(), op, ": ranks must have at most 32767 columns",
        " (got ", width, ")");
  Tensor positions = torch::stable::new_empty(ranks, {n, width}, ScalarType::Short);
  const CudaScope scope(ranks);
  launch_reciprocal_positions({positions.mutable_data_ptr<int16_t>(), int32_data(ranks), n, width},
                              scope.stream());
  scope.check_launch();
  return positions;
}

std::tuple<Tensor, Tensor> k_reciprocal_cuda(const Tensor& ranks_in, const Tensor& positions_in,
                                             int64_t k, int64_t half, int64_t begin, int64_t end) {
  constexpr const char* op = "k_reciprocal";
  check_ranks(op, ranks_in);
  check(positions_in.scalar_type() == ScalarType::Short && positions_in.dim() == 2 &&
            positions_in.size(0) == ranks_in.size(0) && positions_in.size(1) == ranks_in.size(1),
        op, ": positions must be int16, of the shape of ranks");
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  const Tensor positions = torch::stable::contiguous(positions_in);
  KReciprocalParams p{};
  p.ranks = int32_data(ranks);
  p.positions = positions.const_data_ptr<int16_t>();
  p.num_rows = ranks.size(0);
  p.width = ranks.size(1);
  p.k = k;
  p.half = half;
  check(k <= p.width && half <= p.width, op, ": k and half must be at most ", p.width, " (got ", k,
        " and ", half, ")");
  check_range(op, begin, end, p.num_rows);
  auto [offsets, columns, values] =
      make_rows_cuda(ranks, p, begin, end, kSetCells, false, launch_k_reciprocal);
  return {offsets, columns};
}

Tensor pair_dots_cuda(const Tensor& features_in, const Tensor& ranks_in,
                      const std::optional<Tensor>& similarities_in, const Tensor& offsets_in,
                      const Tensor& columns_in, int64_t begin) {
  constexpr const char* op = "pair_dots";
  check_rank(op, "features", features_in, 2);
  check_float(op, "features", features_in);
  check_ranks(op, ranks_in);
  check_csr(op, offsets_in, columns_in);
  const Tensor features = torch::stable::contiguous(features_in);
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  std::optional<Tensor> similarities;
  if (similarities_in.has_value()) {
    check_float(op, "similarities", *similarities_in);
    check(similarities_in->dim() == 2 && similarities_in->size(0) == ranks.size(0) &&
              similarities_in->size(1) == ranks.size(1),
          op, ": similarities must have the shape of ranks");
    similarities = torch::stable::contiguous(*similarities_in);
  }
  PairDotsParams p{};
  p.rows = offsets.size(0) - 1;
  check_range(op, begin, begin + p.rows, features.size(0));
  Tensor dots = torch::stable::new_empty(features, {columns.size(0)});
  p.dots = dots.mutable_data_ptr<float>();
  p.features = float_data(features);
  p.ranks = int32_data(ranks);
  p.similarities = similarities.has_value() ? float_data(*similarities) : nullptr;
  p.offsets = int64_data(offsets);
  p.columns = int32_data(columns);
  p.num_rows = features.size(0);
  p.dim = features.size(1);
  p.width = ranks.size(1);
  p.begin = begin;
  const CudaScope scope(features);
  launch_pair_dots(p, scope.stream());
  scope.check_launch();
  return dots;
}

Tensor softmax_rows_cuda(const Tensor& offsets_in, const Tensor& logits_in) {
  constexpr const char* op = "softmax_rows";
  check_rank(op, "offsets", offsets_in, 1);
  check_int64(op, "offsets", offsets_in);
  check_rank(op, "logits", logits_in, 1);
  check_float(op, "logits", logits_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor logits = torch::stable::contiguous(logits_in);
  Tensor weights = torch::stable::new_empty(logits, {logits.size(0)});
  const CudaScope scope(logits);
  launch_softmax_rows({weights.mutable_data_ptr<float>(), float_data(logits), int64_data(offsets),
                       offsets.size(0) - 1},
                      scope.stream());
  scope.check_launch();
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> query_expand_cuda(const Tensor& ranks_in, const Tensor& offsets,
                                                     const Tensor& columns, const Tensor& values,
                                                     int64_t k2, int64_t begin, int64_t end) {
  constexpr const char* op = "query_expand";
  check_ranks(op, ranks_in);
  const Matrix v(op, offsets, columns, values);
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  QueryExpandParams p{};
  p.ranks = int32_data(ranks);
  p.offsets = int64_data(v.offsets);
  p.columns = int32_data(v.columns);
  p.values = float_data(v.values);
  p.num_rows = v.rows();
  p.width = ranks.size(1);
  p.k2 = k2;
  check(k2 >= 1 && k2 <= p.width, op, ": k2 must be in [1, ", p.width, "] (got ", k2, ")");
  check_range(op, begin, end, ranks.size(0));
  return make_rows_cuda(ranks, p, begin, end, kSetCells, true, launch_query_expand);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inverted_index_cuda(
    const Tensor& offsets, const Tensor& columns, const Tensor& values, double eps) {
  const Matrix q("inverted_index", offsets, columns, values);
  const int64_t n = q.rows(), nnz = q.nnz();
  Tensor order = torch::stable::new_empty(q.columns, {nnz}, ScalarType::Int);
  Tensor prefix = torch::stable::new_empty(q.columns, {n}, ScalarType::Int);
  Tensor list_offsets = int64s(q.columns, n + 1), list_split = int64s(q.columns, n);
  Tensor list_rows = torch::stable::new_empty(q.columns, {nnz}, ScalarType::Int);
  Tensor list_values = torch::stable::new_empty(q.columns, {nnz}, ScalarType::Float);
  const Tensor pool = int64s(q.columns, nnz), next = int64s(q.columns, n);
  const Tensor tiles = int64s(q.columns, scan_tiles(n)), longest = int64s(q.columns, 1);
  IndexParams p{};
  p.order = order.mutable_data_ptr<int32_t>();
  p.prefix = prefix.mutable_data_ptr<int32_t>();
  p.list_offsets = int64_out(list_offsets);
  p.list_split = int64_out(list_split);
  p.list_rows = list_rows.mutable_data_ptr<int32_t>();
  p.list_values = list_values.mutable_data_ptr<float>();
  p.offsets = int64_data(q.offsets);
  p.columns = int32_data(q.columns);
  p.values = float_data(q.values);
  p.pool = pool_out(pool);
  p.next = int64_out(next);
  p.tiles = int64_out(tiles);
  p.longest = int64_out(longest);
  p.num_rows = n;
  p.nnz = nnz;
  p.eps = static_cast<float>(eps);
  const CudaScope scope(q.columns);
  launch_inverted_index(p, scope.stream());
  scope.check_launch();
  return {order, prefix, list_offsets, list_split, list_rows, list_values};
}

std::tuple<Tensor, Tensor, Tensor> jaccard_join_cuda(
    const Tensor& offsets, const Tensor& columns, const Tensor& values, const Tensor& order_in,
    const Tensor& prefix_in, const Tensor& list_offsets_in, const Tensor& list_split_in,
    const Tensor& list_rows_in, const Tensor& list_values_in, double eps, int64_t begin,
    int64_t end) {
  constexpr const char* op = "jaccard_join";
  const Matrix q(op, offsets, columns, values);
  check_int32(op, "order", order_in);
  check_int32(op, "prefix", prefix_in);
  check_int64(op, "list_offsets", list_offsets_in);
  check_int64(op, "list_split", list_split_in);
  check_int32(op, "list_rows", list_rows_in);
  check_float(op, "list_values", list_values_in);
  const Tensor order = torch::stable::contiguous(order_in);
  const Tensor prefix = torch::stable::contiguous(prefix_in);
  const Tensor list_offsets = torch::stable::contiguous(list_offsets_in);
  const Tensor list_split = torch::stable::contiguous(list_split_in);
  const Tensor list_rows = torch::stable::contiguous(list_rows_in);
  const Tensor list_values = torch::stable::contiguous(list_values_in);
  check_range(op, begin, end, q.rows());
  const Tensor longest = int64s(q.columns, 1);
  JoinParams p{};
  p.offsets = int64_data(q.offsets);
  p.columns = int32_data(q.columns);
  p.values = float_data(q.values);
  p.order = int32_data(order);
  p.prefix = int32_data(prefix);
  p.list_offsets = int64_data(list_offsets);
  p.list_split = int64_data(list_split);
  p.list_rows = int32_data(list_rows);
  p.list_values = float_data(list_values);
  p.longest = int64_out(longest);
  p.num_rows = q.rows();
  p.mean_row = q.rows() == 0 ? 0 : q.nnz() / q.rows() + 1;
  p.eps = static_cast<float>(eps);
  return make_rows_cuda(q.columns, p, begin, end, kTableCells, true, launch_jaccard_join);
}

std::tuple<Tensor, Tensor, Tensor> mirror_csr_cuda(const Tensor& offsets, const Tensor& columns,
                                                   const Tensor& values) {
  const Matrix upper("mirror_csr", offsets, columns, values);
  const int64_t n = upper.rows();
  Tensor full_offsets = int64s(upper.offsets, n + 1);
  const Tensor next = int64s(upper.offsets, n);
  MirrorParams p{};
  p.full_offsets = int64_out(full_offsets);
  p.next = int64_out(next);
  p.offsets = int64_data(upper.offsets);
  p.columns = int32_data(upper.columns);
  p.values = float_data(upper.values);
  p.num_rows = n;
  const CudaScope scope(upper.offsets);
  launch_mirror_count(p, scope.stream());
  scope.check_launch();
  scan_on(scope, full_offsets);
  int64_t nnz = 0;
  scope.read_back(&nnz, int64_data(full_offsets) + n, 1);
  const Tensor pool = int64s(upper.offsets, nnz);
  p.pool = pool_out(pool);
  launch_mirror_fill(p, scope.stream());
  scope.check_launch();
  Tensor full_columns = int64s(upper.offsets, nnz);
  Tensor full_values = torch::stable::new_empty(upper.offsets, {nnz}, ScalarType::Float);
  GatherParams g{};
  g.offsets = g.starts = int64_data(full_offsets);
  g.pool = p.pool;
  g.columns64 = int64_out(full_columns);
  g.values = full_values.mutable_data_ptr<float>();
  g.rows = n;
  launch_gather_lines(g, scope.stream());
  scope.check_launch();
  return {full_offsets, full_columns, full_values};
}

Tensor jaccard_rows_cuda(const Tensor& offsets, const Tensor& columns, const Tensor& values,
                         const Tensor& list_offsets_in, const Tensor& list_rows_in,
                         const Tensor& list_values_in, int64_t begin, int64_t end) {
  constexpr const char* op = "jaccard_rows";
  const Matrix q(op, offsets, columns, values);
  check_int64(op, "list_offsets", list_offsets_in);
  check_int32(op, "list_rows", list_rows_in);
  check_float(op, "list_values", list_values_in);
  const Tensor list_offsets = torch::stable::contiguous(list_offsets_in);
  const Tensor list_rows = torch::stable::contiguous(list_rows_in);
  const Tensor list_values = torch::stable::contiguous(list_values_in);
  check_range(op, begin, end, q.rows());
  Tensor distances = torch::stable::new_empty(q.values, {end - begin, q.rows()});
  JaccardRowsParams p{};
  p.distances = distances.mutable_data_ptr<float>();
  p.offsets = int64_data(q.offsets);
  p.columns = int32_data(q.columns);
  p.values = float_data(q.values);
  p.list_offsets = int64_data(list_offsets);
  p.list_rows = int32_data(list_rows);
  p.list_values = float_data(list_values);
  p.num_rows = q.rows();
  p.begin = begin;
  p.rows = end - begin;
  const CudaScope scope(q.values);
  launch_jaccard_rows(p, scope.stream());
  scope.check_launch();
  return distances;
}

Tensor dbscan_cuda(const Tensor& offsets_in, const Tensor& columns_in, const Tensor& values_in,
                   double eps, int64_t min_samples) {
  constexpr const char* op = "dbscan";
  check_rank(op, "offsets", offsets_in, 1);
  check_int64(op, "offsets", offsets_in);
  check_int64(op, "columns", columns_in);
  check_float(op, "values", values_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  const Tensor values = torch::stable::contiguous(values_in);
  const int64_t n = offsets.size(0) - 1;
  Tensor labels = int64s(offsets, n);
  const Tensor parent = int64s(offsets, n), number = int64s(offsets, n + 1);
  const Tensor tiles = int64s(offsets, scan_tiles(n));
  DbscanParams p{};
  p.labels = int64_out(labels);
  p.parent = int64_out(parent);
  p.number = int64_out(number);
  p.tiles = int64_out(tiles);
  p.offsets = int64_data(offsets);
  p.columns = int64_data(columns);
  p.values = float_data(values);
  p.num_rows = n;
  p.min_samples = min_samples;
  p.eps = static_cast<float>(eps);
  const CudaScope scope(offsets);
  launch_dbscan(p, scope.stream());
  scope.check_launch();
  return labels;
}
#endif

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) {
  m.impl("reciprocal_positions", TORCH_BOX(&dhcl::reciprocal_positions_cpu));
  m.impl("k_reciprocal", TORCH_BOX(&dhcl::k_reciprocal_cpu));
  m.impl("pair_dots", TORCH_BOX(&dhcl::pair_dots_cpu));
  m.impl("softmax_rows", TORCH_BOX(&dhcl::softmax_rows_cpu));
  m.impl("query_expand", TORCH_BOX(&dhcl::query_expand_cpu));
  m.impl("inverted_index", TORCH_BOX(&dhcl::inverted_index_cpu));
  m.impl("jaccard_join", TORCH_BOX(&dhcl::jaccard_join_cpu));
  m.impl("mirror_csr", TORCH_BOX(&dhcl::mirror_csr_cpu));
  m.impl("jaccard_rows", TORCH_BOX(&dhcl::jaccard_rows_cpu));
  m.impl("dbscan", TORCH_BOX(&dhcl::dbscan_cpu));
}

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) {
  m.impl("reciprocal_positions", TORCH_BOX(&dhcl::reciprocal_positions_cuda));
  m.impl("k_reciprocal", TORCH_BOX(&dhcl::k_reciprocal_cuda));
  m.impl("pair_dots", TORCH_BOX(&dhcl::pair_dots_cuda));
  m.impl("softmax_rows", TORCH_BOX(&dhcl::softmax_rows_cuda));
  m.impl("query_expand", TORCH_BOX(&dhcl::query_expand_cuda));
  m.impl("inverted_index", TORCH_BOX(&dhcl::inverted_index_cuda));
  m.impl("jaccard_join", TORCH_BOX(&dhcl::jaccard_join_cuda));
  m.impl("mirror_csr", TORCH_BOX(&dhcl::mirror_csr_cuda));
  m.impl("jaccard_rows", TORCH_BOX(&dhcl::jaccard_rows_cuda));
  m.impl("dbscan", TORCH_BOX(&dhcl::dbscan_cuda));
}
#endif
