// Sparse Jaccard distance on the CPU, and the glue that registers the CPU and CUDA kernels with
// torch. What the stages promise is in jaccard.h; the CUDA kernels are in jaccard.cu. A stage that
// makes rows takes a range of them, so that a caller can report progress and be interrupted between
// ranges; ranges do not show in the result.
#include "jaccard.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/csr_glue.h"

namespace dhcl {
namespace {

// ---- inverted index -----------------------------------------------------------------------------

int64_t longest_row(const int64_t* offsets, int64_t rows) {
  int64_t longest = 0;
  for (int64_t i = 0; i < rows; ++i) longest = std::max(longest, offsets[i + 1] - offsets[i]);
  return longest;
}

int64_t fixed(float weight) {
  return static_cast<int64_t>(static_cast<double>(weight) * kFixedPoint);
}

void count_columns(const IndexParams& p) {
  std::fill_n(p.list_offsets, p.num_rows + 1, 0);
  for (int64_t e = 0; e < p.nnz; ++e) {
    const int64_t c = p.columns[e];
    check(c >= 0 && c < p.num_rows, "inverted_index: columns must be in [0, ", p.num_rows,
          ") (got ", c, ")");
    ++p.list_offsets[c + 1];
  }
  std::partial_sum(p.list_offsets, p.list_offsets + p.num_rows + 1, p.list_offsets);
}

// The order of the entries of row i and the length of its head; marks the entries that are in it.
void order_row(const IndexParams& p, int64_t i, int64_t needed, uint8_t* in_prefix) {
  thread_local std::vector<uint64_t> keys;
  const int64_t begin = p.offsets[i], size = p.offsets[i + 1] - begin;
  keys.resize(size);
  int64_t rest = 0;
  for (int64_t e = 0; e < size; ++e) {
    const int64_t c = p.columns[begin + e];
    const int64_t frequency = p.list_offsets[c + 1] - p.list_offsets[c];
    // Positions in the row ascend with the column, so they break ties as columns do.
    keys[e] = static_cast<uint64_t>(frequency) << 32 | static_cast<uint64_t>(e);
    rest += fixed(p.values[begin + e]);
  }
  std::sort(keys.begin(), keys.end());
  int32_t head = 0;
  for (int64_t e = 0; e < size; ++e) {
    const int64_t place = begin + static_cast<int64_t>(keys[e] & 0xffffffffu);
    p.order[begin + e] = static_cast<int32_t>(place - begin);
    if (rest < needed) continue;
    rest -= fixed(p.values[place]);
    in_prefix[place] = 1;
    ++head;
  }
  p.prefix[i] = head;
}

void run_inverted_index(const IndexParams& p) {
  const int64_t n = p.num_rows;
  count_columns(p);
  const int64_t needed =
      static_cast<int64_t>(shared_weight_needed(p.eps, longest_row(p.offsets, n)) * kFixedPoint);
  std::vector<uint8_t> in_prefix(p.nnz, 0);
  parallel_rows(n, 1, 8 * p.nnz, [&](int64_t i) { order_row(p, i, needed, in_prefix.data()); });
  std::copy_n(p.list_offsets, n, p.list_split);
  for (int64_t e = 0; e < p.nnz; ++e) p.list_split[p.columns[e]] += in_prefix[e];
  std::vector<int64_t> head(p.list_offsets, p.list_offsets + n);
  std::vector<int64_t> tail(p.list_split, p.list_split + n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t e = p.offsets[i]; e < p.offsets[i + 1]; ++e) {
      const int64_t place = in_prefix[e] ? head[p.columns[e]]++ : tail[p.columns[e]]++;
      p.list_rows[place] = static_cast<int32_t>(i);
      p.list_values[place] = p.values[e];
    }
  }
}

// order: the entries of each row, rarest column first (then by column), as positions in the row.
// prefix: the length of the shortest head of that order after which less than the needed weight
// remains. Two rows that share the needed weight share a column that lies in both heads.
// lists: the rows of each column; first those that have it in their head (up to split), then the
// rest, both ascending.
template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inverted_index(const Tensor& offsets,
                                                                          const Tensor& columns,
                                                                          const Tensor& values,
                                                                          double eps) {
  const Matrix q(Device(), "inverted_index", offsets, columns, values);
  const int64_t n = q.rows(), nnz = q.nnz();
  const Tensor order = new_int32(q.columns, nnz), prefix = new_int32(q.columns, n);
  const Tensor list_offsets = new_int64(q.columns, n + 1), list_split = new_int64(q.columns, n);
  const Tensor list_rows = new_int32(q.columns, nnz), list_values = new_float(q.columns, nnz);
  // The kernels' scratch; the CPU code needs none of it.
  const auto scratch = [&](int64_t size) { return new_int64(q.columns, Device::kCuda ? size : 0); };
  const Tensor pool = scratch(nnz), next = scratch(n), tiles = scratch(scan_tiles(n));
  const Tensor longest = scratch(1);
  IndexParams p{};
  p.order = int32_out(order);
  p.prefix = int32_out(prefix);
  p.list_offsets = int64_out(list_offsets);
  p.list_split = int64_out(list_split);
  p.list_rows = int32_out(list_rows);
  p.list_values = float_out(list_values);
  q.give_to(p);
  p.pool = pool_out(pool);
  p.next = int64_out(next);
  p.tiles = int64_out(tiles);
  p.longest = int64_out(longest);
  p.num_rows = n;
  p.nnz = nnz;
  p.eps = static_cast<float>(eps);
  Device::template run<run_inverted_index, launch_inverted_index>(q.columns, p);
  return {order, prefix, list_offsets, list_split, list_rows, list_values};
}

// What inverted_index made of each column, checked and contiguous.
struct ColumnLists {
  template <typename Device>
  ColumnLists(Device, const char* op, const Tensor& offsets_in, const Tensor& rows_in,
              const Tensor& values_in, int64_t columns) {
    check_int64(op, "list_offsets", offsets_in);
    check_int32(op, "list_rows", rows_in);
    check_float(op, "list_values", values_in);
    check_length(op, "list_offsets", offsets_in, columns + 1);
    check_rank(op, "list_rows", rows_in, 1);
    check_length(op, "list_values", values_in, rows_in.size(0));
    offsets = torch::stable::contiguous(offsets_in);
    rows = torch::stable::contiguous(rows_in);
    values = torch::stable::contiguous(values_in);
    check_lists<Device>(op, "list_offsets", offsets, rows.size(0));
  }
  template <typename Params>
  void give_to(Params& p) const {
    p.list_offsets = int64_data(offsets);
    p.list_rows = int32_data(rows);
    p.list_values = float_data(values);
  }
  Tensor offsets, rows, values;
};

// ---- join ---------------------------------------------------------------------------------------

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

struct JoinScratch {
  std::vector<float> sums;     // [N] by row, kAbsent between rows
  std::vector<float> own;      // [N] by column, zero between rows
  std::vector<int32_t> found;  // [N + 1] candidates
  std::vector<int64_t> cost;   // what the lists from an entry on cost
  std::vector<std::pair<int32_t, float>> kept;
};

// Makes one row of the upper triangle (diagonal included) of the eps-graph:
//  1. walk the columns of the head and make every later row that has the column in its own head a
//     candidate; add up the minima of candidates, also over the columns behind the head;
//  2. leave the remaining, longest lists out as soon as they cost more than looking at the
//     candidates that can still reach the needed weight: this is what a hub cannot hurt;
//  3. sum the survivors again, exactly and in ascending column order.
class JoinRow {
 public:
  JoinRow(const JoinParams& p, float needed, JoinScratch& s, int64_t i)
      : p_(p),
        q_{p.offsets, p.columns, p.values},
        needed_(needed),
        s_(s),
        sums_(s.sums.data()),
        found_(s.found.data()),
        self_(static_cast<int32_t>(i)),
        first_(q_.begin(i)),
        size_(q_.size(i)) {}

  void make(Lines& out) {
    lay_out();
    collect();
    drop_all_but_survivors();
    measure();
    for (int64_t e = first_; e < first_ + size_; ++e) s_.own[q_.columns[e]] = 0.0f;
    std::sort(s_.kept.begin(), s_.kept.end());
    for (const auto& [j, distance] : s_.kept) {
      out.columns.push_back(j);
      out.values.push_back(distance);
    }
  }

 private:
  int64_t entry(int64_t k) const { return first_ + p_.order[first_ + k]; }

  void lay_out() {
    s_.cost.resize(size_ + 1);
    s_.cost[size_] = 0;
    for (int64_t k = size_ - 1; k >= 0; --k) {
      const int64_t c = q_.columns[entry(k)];
      s_.cost[k] = s_.cost[k + 1] + p_.list_offsets[c + 1] - p_.list_offsets[c];
    }
    for (int64_t e = first_; e < first_ + size_; ++e) {
      s_.own[q_.columns[e]] = q_.values[e];
      rest_ += q_.values[e];
    }
  }

  // Steps 1 and 2. Sums go in the order of the row, rarest column first.
  void collect() {
    const int64_t n = p_.num_rows;
    // Of a list's rows about this share comes after this one.
    const double share = static_cast<double>(n - self_) / static_cast<double>(n);
    int64_t k = 0;
    for (; k < size_; ++k) {
      const int64_t e = entry(k);
      const int64_t c = q_.columns[e];
      const float v = q_.values[e];
      const int64_t start = p_.list_offsets[c], split = p_.list_split[c];
      if (k < p_.prefix[self_]) {
        add_candidates(start, split, v);
      } else {
        if (costs_more_than_it_saves(share * static_cast<double>(s_.cost[k]))) break;
        add_to_candidates(start, split, v);
      }
      add_to_candidates(split, p_.list_offsets[c + 1], v);
      rest_ -= v;
    }
    // The remaining weight as a difference of floats; the margin in the needed weight covers it.
    if (k == size_) rest_ = 0.0f;
  }

  // Rows ascend in a piece of a list, so it is walked backwards down to this row.
  void add_candidates(int64_t begin, int64_t end, float v) {
    int64_t count = count_;
    for (int64_t r = end - 1; r >= begin && p_.list_rows[r] > self_; --r) {
      const int32_t j = p_.list_rows[r];
      const float sum = sums_[j];
      found_[count] = j;
      count += sum < 0.0f;
      sums_[j] = std::max(sum, 0.0f) + std::min(v, p_.list_values[r]);
    }
    count_ = count;
  }

  void add_to_candidates(int64_t begin, int64_t end, float v) {
    for (int64_t r = end - 1; r >= begin && p_.list_rows[r] > self_; --r)
      sums_[p_.list_rows[r]] += std::min(v, p_.list_values[r]);
  }

  // Whether the lists that are left, so many entries, cost more than a look at the candidates.
  // Those that can no longer reach the needed weight are dropped, then what is left decides.
  bool costs_more_than_it_saves(double ahead) {
    if (!(ahead > static_cast<double>(count_))) return false;
    int64_t kept = 0;
    for (int64_t m = 0; m < count_; ++m) {
      const int32_t j = found_[m];
      if (sums_[j] + rest_ >= needed_)
        found_[kept++] = j;
      else
        sums_[j] = kAbsent;
    }
    count_ = kept;
    return ahead > static_cast<double>(count_ * p_.mean_row);
  }

  void drop_all_but_survivors() {
    int64_t survivors = 0;
    for (int64_t m = 0; m < count_; ++m) {
      const int32_t j = found_[m];
      if (sums_[j] + rest_ >= needed_) found_[survivors++] = j;
      sums_[j] = kAbsent;
    }
    found_[survivors++] = self_;
    count_ = survivors;
  }

  // Step 3.
  void measure() {
    s_.kept.clear();
    int64_t m = 0;
    for (; m + 4 <= count_; m += 4) {
      float t[4];
      shared_weight4(q_, found_ + m, s_.own.data(), t);
      for (int64_t lane = 0; lane < 4; ++lane) keep(found_[m + lane], t[lane]);
    }
    for (; m < count_; ++m) keep(found_[m], shared_weight(q_, found_[m], s_.own.data()));
  }

  void keep(int32_t j, float t) {
    const float distance = jaccard(t);
    if (distance <= p_.eps) s_.kept.emplace_back(j, distance);
  }

  const JoinParams& p_;
  const Csr q_;
  const float needed_;
  JoinScratch& s_;
  float* const sums_;
  int32_t* const found_;
  const int32_t self_;
  const int64_t first_;  // its entries are [first_, first_ + size_)
  const int64_t size_;
  float rest_ = 0.0f;  // weight of the columns that have not been walked
  int64_t count_ = 0;  // candidates in found_
};

NewRows jaccard_join_rows(const Tensor& like, const JoinParams& p) {
  const int64_t n = p.num_rows;
  const float needed = static_cast<float>(shared_weight_needed(p.eps, longest_row(p.offsets, n)));
  const auto make = [n] {
    JoinScratch s;
    s.sums.assign(n, kAbsent);
    s.own.assign(n, 0.0f);
    s.found.resize(n + 1);
    return s;
  };
  const auto row = [&](JoinScratch& s, int64_t i, Lines& out) {
    JoinRow(p, needed, s, i).make(out);
  };
  return make_rows<JoinScratch>(like, p.lines, true, p.lines.rows * p.mean_row * 16, make, row);
}

template <typename Device>
NewRows jaccard_join(const Tensor& offsets, const Tensor& columns, const Tensor& values,
                     const Tensor& order_in, const Tensor& prefix_in, const Tensor& list_offsets,
                     const Tensor& list_split_in, const Tensor& list_rows,
                     const Tensor& list_values, double eps, int64_t begin, int64_t end) {
  constexpr const char* op = "jaccard_join";
  const Matrix q(Device(), op, offsets, columns, values);
  const ColumnLists lists(Device(), op, list_offsets, list_rows, list_values, q.rows());
  check_int32(op, "order", order_in);
  check_int32(op, "prefix", prefix_in);
  check_int64(op, "list_split", list_split_in);
  check_length(op, "order", order_in, q.nnz());
  check_length(op, "prefix", prefix_in, q.rows());
  check_length(op, "list_split", list_split_in, q.rows());
  const Tensor order = torch::stable::contiguous(order_in);
  const Tensor prefix = torch::stable::contiguous(prefix_in);
  const Tensor list_split = torch::stable::contiguous(list_split_in);
  const Tensor longest = new_int64(q.columns, 1);
  JoinParams p{};
  p.lines.begin = begin;
  p.lines.rows = end - begin;
  p.table.cells = kTableCells;
  p.table.large_cells = kLargeCells;
  q.give_to(p);
  lists.give_to(p);
  p.order = int32_data(order);
  p.prefix = int32_data(prefix);
  p.list_split = int64_data(list_split);
  p.longest = int64_out(longest);
  p.num_rows = q.rows();
  p.mean_row = q.rows() == 0 ? 0 : q.nnz() / q.rows() + 1;
  p.eps = static_cast<float>(eps);
  check_range(op, begin, end, p.num_rows);
  return make_rows_on<Device, jaccard_join_rows, launch_jaccard_join>(q.columns, p, true);
}

// ---- symmetric and dense matrices ---------------------------------------------------------------

void run_mirror_count(const MirrorParams& p) {
  const int64_t n = p.num_rows;
  std::fill_n(p.full_offsets, n + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    p.full_offsets[i + 1] += p.offsets[i + 1] - p.offsets[i];
    for (int64_t e = p.offsets[i]; e < p.offsets[i + 1]; ++e) {
      const int64_t j = p.columns[e];
      check(j >= i && j < n, "mirror_csr: columns must be in [row, ", n, ") (got ", j, " in row ",
            i, ")");
      p.full_offsets[j + 1] += j != i;
    }
  }
  std::partial_sum(p.full_offsets, p.full_offsets + n + 1, p.full_offsets);
}

// When row i comes, all that mirrors into it, from rows before it, is in place.
void run_mirror_fill(const MirrorParams& p, int64_t* column_out, float* value_out) {
  std::vector<int64_t> next(p.full_offsets, p.full_offsets + p.num_rows);
  for (int64_t i = 0; i < p.num_rows; ++i) {
    for (int64_t e = p.offsets[i]; e < p.offsets[i + 1]; ++e) {
      const int64_t j = p.columns[e];
      column_out[next[i]] = j;
      value_out[next[i]++] = p.values[e];
      if (j == i) continue;
      column_out[next[j]] = i;
      value_out[next[j]++] = p.values[e];
    }
  }
}

NewRows mirror_on(Cpu, const Matrix& upper, MirrorParams& p, const Tensor& full_offsets) {
  run_mirror_count(p);
  const int64_t nnz = p.full_offsets[p.num_rows];
  const Tensor columns = new_int64(upper.offsets, nnz), values = new_float(upper.offsets, nnz);
  run_mirror_fill(p, int64_out(columns), float_out(values));
  return {full_offsets, columns, values};
}

#ifdef DHCL_CUDA
NewRows mirror_on(Cuda, const Matrix& upper, MirrorParams& p, const Tensor& full_offsets) {
  const CudaScope scope(upper.offsets);
  const Tensor next = new_int64(upper.offsets, p.num_rows);
  p.next = int64_out(next);
  launch_mirror_count(p, scope.stream());
  scope.check_launch();
  scan_on(scope, full_offsets);
  int64_t nnz = 0;
  scope.read_back(&nnz, int64_data(full_offsets) + p.num_rows, 1);
  const Tensor pool = new_int64(upper.offsets, nnz);
  p.pool = pool_out(pool);
  launch_mirror_fill(p, scope.stream());
  scope.check_launch();
  const Tensor columns = new_int64(upper.offsets, nnz), values = new_float(upper.offsets, nnz);
  GatherParams g{};
  g.offsets = g.starts = int64_data(full_offsets);
  g.pool = p.pool;
  g.columns64 = int64_out(columns);
  g.values = float_out(values);
  g.rows = p.num_rows;
  launch_gather_lines(g, scope.stream());
  scope.check_launch();
  return {full_offsets, columns, values};
}
#endif

// The full symmetric matrix from its upper triangle: int64 columns, ascending.
template <typename Device>
NewRows mirror_csr(const Tensor& offsets, const Tensor& columns, const Tensor& values) {
  const Matrix upper(Device(), "mirror_csr", offsets, columns, values);
  const Tensor full_offsets = new_int64(upper.offsets, upper.rows() + 1);
  MirrorParams p{};
  p.full_offsets = int64_out(full_offsets);
  upper.give_to(p);
  p.num_rows = upper.rows();
  return mirror_on(Device(), upper, p, full_offsets);
}

// Through the plain index: columns ascend, so the sums have their order without further care.
void run_jaccard_rows(const JaccardRowsParams& p) {
  const int64_t n = p.num_rows;
  parallel_tasks(p.rows, 1, p.rows * n, [&](int64_t r) {
    float* sums = p.distances + r * n;
    std::fill_n(sums, n, 0.0f);
    for (int64_t e = p.offsets[p.begin + r]; e < p.offsets[p.begin + r + 1]; ++e) {
      const int64_t c = p.columns[e];
      for (int64_t k = p.list_offsets[c]; k < p.list_offsets[c + 1]; ++k)
        sums[p.list_rows[k]] += std::min(p.values[e], p.list_values[k]);
    }
    for (int64_t j = 0; j < n; ++j) sums[j] = jaccard(sums[j]);
  });
}

// Rows [begin, end) of the dense distance matrix.
template <typename Device>
Tensor jaccard_rows(const Tensor& offsets, const Tensor& columns, const Tensor& values,
                    const Tensor& list_offsets, const Tensor& list_rows, const Tensor& list_values,
                    int64_t begin, int64_t end) {
  constexpr const char* op = "jaccard_rows";
  const Matrix q(Device(), op, offsets, columns, values);
  const ColumnLists lists(Device(), op, list_offsets, list_rows, list_values, q.rows());
  check_range(op, begin, end, q.rows());
  const Tensor distances = torch::stable::new_empty(q.values, {end - begin, q.rows()});
  JaccardRowsParams p{};
  p.distances = float_out(distances);
  q.give_to(p);
  lists.give_to(p);
  p.num_rows = q.rows();
  p.begin = begin;
  p.rows = end - begin;
  Device::template run<run_jaccard_rows, launch_jaccard_rows>(q.values, p);
  return distances;
}

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("inverted_index", TORCH_BOX(&inverted_index<Device>));
  m.impl("jaccard_join", TORCH_BOX(&jaccard_join<Device>));
  m.impl("mirror_csr", TORCH_BOX(&mirror_csr<Device>));
  m.impl("jaccard_rows", TORCH_BOX(&jaccard_rows<Device>));
}

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) { dhcl::register_ops<dhcl::Cpu>(m); }

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) { dhcl::register_ops<dhcl::Cuda>(m); }
#endif
