// Ranks of right matches on the CPU, and the glue that registers the CPU and CUDA kernels with
// torch. The order is that of ranking.h; the CUDA kernel is in ranking.cu.
#include "ranking.h"

#include <algorithm>
#include <vector>

#include "common/cpu.h"

namespace dhcl {
namespace {

// Entries of a piece of a row before a distance, and before it or equal to it. A piece is short
// enough for 32-bit counts, which the processor adds in vectors.
constexpr int64_t kPiece = 2048;
template <typename T>
inline int64_t count_less_of(const T* x, int64_t n, T d) {
  int32_t count = 0;
  for (int64_t g = 0; g < n; ++g) count += static_cast<int32_t>(x[g] < d);
  return count;
}
template <typename T>
inline int64_t count_less_equal_of(const T* x, int64_t n, T d) {
  int32_t count = 0;
  for (int64_t g = 0; g < n; ++g) count += static_cast<int32_t>(x[g] <= d);
  return count;
}
DHCL_CLONES int64_t count_less(const float* x, int64_t n, float d) {
  return count_less_of(x, n, d);
}
DHCL_CLONES int64_t count_less(const double* x, int64_t n, double d) {
  return count_less_of(x, n, d);
}
DHCL_CLONES int64_t count_less_equal(const float* x, int64_t n, float d) {
  return count_less_equal_of(x, n, d);
}
DHCL_CLONES int64_t count_less_equal(const double* x, int64_t n, double d) {
  return count_less_equal_of(x, n, d);
}

// Up to this many matches a pass over the row for each is cheaper than a search for each entry.
constexpr int64_t kFewMatches = 128;

// Adds to each match the number of entries of the row before it, removed ones and itself included.
template <typename T>
void count_by_passes(const T* row, int64_t n, const std::vector<int64_t>& matches, int64_t* ranks) {
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t end = std::min(start + kPiece, n);
    for (size_t i = 0; i < matches.size(); ++i) {
      const int64_t at = std::clamp(matches[i] + 1, start, end);
      const T d = row[matches[i]];
      ranks[i] += count_less_equal(row + start, at - start, d) + count_less(row + at, end - at, d);
    }
  }
}

template <typename T>
void count_by_search(const T* row, int64_t n, const std::vector<int64_t>& matches, int64_t* ranks) {
  const auto before = [row](int64_t a, int64_t b) {
    return row[a] != row[b] ? row[a] < row[b] : a < b;
  };
  std::vector<int64_t> order(matches.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return before(matches[a], matches[b]); });
  // entries[i]: entries between the match before i and i, itself included.
  std::vector<int64_t> entries(matches.size() + 1, 0);
  for (int64_t g = 0; g < n; ++g) {
    const auto first =
        std::lower_bound(order.begin(), order.end(), g,
                         [&](int64_t i, int64_t entry) { return before(matches[i], entry); });
    ++entries[first - order.begin()];
  }
  int64_t sum = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    sum += entries[i];
    ranks[order[i]] += sum;
  }
}

template <typename T>
void ranks_of_query(const MatchRanksParams& p, int64_t q) {
  const T* row = static_cast<const T*>(p.distance) + q * p.num_gallery;
  const int64_t* members = p.members + p.begin[q];
  const int64_t count = p.offsets[q + 1] - p.offsets[q];
  int64_t* out = p.ranks + p.offsets[q];
  thread_local std::vector<int64_t> matches, removed, ranks, places;
  matches.clear();
  removed.clear();
  places.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t g = members[i];
    out[i] = 0;
    if (p.query_cameras != nullptr && p.gallery_cameras[g] == p.query_cameras[q]) {
      removed.push_back(g);
    } else {
      matches.push_back(g);
      places.push_back(i);
    }
  }
  ranks.assign(matches.size(), 0);
  if (count <= kFewMatches)
    count_by_passes(row, p.num_gallery, matches, ranks.data());
  else
    count_by_search(row, p.num_gallery, matches, ranks.data());
  for (size_t i = 0; i < matches.size(); ++i) {
    const int64_t match = matches[i];
    for (const int64_t g : removed)
      ranks[i] -= row[g] < row[match] || (row[g] == row[match] && g < match);
    out[places[i]] = ranks[i];
  }
}

void run_match_ranks(const MatchRanksParams& p) {
  for (int64_t g = 0; g < p.num_gallery; ++g)
    check(p.members[g] >= 0 && p.members[g] < p.num_gallery, "match_ranks: members must be in [0, ",
          p.num_gallery, ") (got ", p.members[g], ")");
  for (int64_t q = 0; q < p.num_queries; ++q)
    check(p.begin[q] >= 0 && p.offsets[q] <= p.offsets[q + 1] &&
              p.begin[q] + p.offsets[q + 1] - p.offsets[q] <= p.num_gallery,
          "match_ranks: the matches of query ", q, " lie outside members");
  parallel_tasks(p.num_queries, 4, p.num_queries * p.num_gallery, [&](int64_t q) {
    p.is_double ? ranks_of_query<double>(p, q) : ranks_of_query<float>(p, q);
  });
}

// ---- glue ---------------------------------------------------------------------------------------

template <typename Device>
Tensor match_ranks(const Tensor& distance, const Tensor& members, const Tensor& begin,
                   const Tensor& offsets, int64_t total, const std::optional<Tensor>& query_cameras,
                   const std::optional<Tensor>& gallery_cameras) {
  constexpr const char* op = "match_ranks";
  check_rank(op, "distance", distance, 2);
  const bool is_double = distance.scalar_type() == ScalarType::Double;
  check(is_double || distance.scalar_type() == ScalarType::Float, op,
        ": distance must be float32 or float64");
  const int64_t queries = distance.size(0);
  const int64_t gallery = distance.size(1);
  const auto checked = [&](const char* name, const Tensor& t, int64_t size) {
    check_rank(op, name, t, 1);
    check_int64(op, name, t);
    check(t.size(0) == size, op, ": ", name, " must have ", size, " elements (got ", t.size(0),
          ")");
    return torch::stable::contiguous(t);
  };
  const Tensor d = torch::stable::contiguous(distance);
  const Tensor m = checked("members", members, gallery);
  const Tensor b = checked("begin", begin, queries);
  const Tensor o = checked("offsets", offsets, queries + 1);
  check(query_cameras.has_value() == gallery_cameras.has_value(), op,
        ": cameras must be given for both query and gallery or neither");
  std::optional<Tensor> qc, gc;
  if (query_cameras.has_value()) {
    qc = checked("query_cameras", *query_cameras, queries);
    gc = checked("gallery_cameras", *gallery_cameras, gallery);
  }
  Tensor ranks = torch::stable::new_empty(m, {total});
  if (queries == 0 || gallery == 0 || total == 0) return ranks;
  MatchRanksParams p{};
  p.ranks = ranks.mutable_data_ptr<int64_t>();
  p.distance = d.const_data_ptr();
  p.members = int64_data(m);
  p.begin = int64_data(b);
  p.offsets = int64_data(o);
  p.query_cameras = qc.has_value() ? int64_data(*qc) : nullptr;
  p.gallery_cameras = gc.has_value() ? int64_data(*gc) : nullptr;
  p.num_queries = queries;
  p.num_gallery = gallery;
  p.is_double = is_double;
  if constexpr (!Device::kCuda)
    check(p.offsets[0] == 0 && p.offsets[queries] == total, op, ": offsets must run from 0 to ",
          total);
  Device::template run<run_match_ranks, launch_match_ranks>(distance, p);
  return ranks;
}

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("match_ranks", TORCH_BOX(&match_ranks<Device>));
}

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) { dhcl::register_ops<dhcl::Cpu>(m); }

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) { dhcl::register_ops<dhcl::Cuda>(m); }
#endif
