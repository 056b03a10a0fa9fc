// Positions in the neighbours' lists against looking them up, sets of mutual neighbours and their
// expansion against sets, and weights of any logits.
// clang-format off: the harness comes first
#include "harness.h"
#include "reciprocal.cpp"
// clang-format on
#include <map>
#include <set>

namespace {

void positions(FuzzedDataProvider& in) {
  const int64_t rows = in.ConsumeIntegralInRange<int64_t>(0, 150);
  const int64_t width = in.ConsumeIntegralInRange<int64_t>(0, 9);
  const bool wild = in.ConsumeProbability<float>() < 0.1f;
  std::vector<int32_t> ranks(rows * width);
  for (int32_t& j : ranks)
    j = static_cast<int32_t>(in.ConsumeIntegralInRange<int64_t>(wild ? -1 : 0, rows - !wild));
  std::vector<int16_t> out(rows * width, -7);
  const dhcl::ReciprocalParams p{out.data(), ranks.data(), rows, width};
  const std::string error = harness::error_of([&] { dhcl::run_reciprocal_positions(p); });
  if (!error.empty()) return;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t q = 0; q < width; ++q) {
      const int32_t* list = ranks.data() + int64_t{ranks[i * width + q]} * width;
      int64_t last = -1;
      for (int64_t at = 0; at < width; ++at)
        if (list[at] == i) last = at;
      harness::require(out[i * width + q] == last, "the place in a neighbour's list");
    }
}

void weights(FuzzedDataProvider& in) {
  const int64_t rows = in.ConsumeIntegralInRange<int64_t>(0, 80);
  std::vector<int64_t> offsets(rows + 1, 0);
  for (int64_t r = 0; r < rows; ++r)
    offsets[r + 1] = offsets[r] + in.ConsumeIntegralInRange<int64_t>(0, 9);
  std::vector<float> logits(offsets[rows]), out(offsets[rows]);
  for (float& x : logits) x = -in.ConsumeFloatingPointInRange<float>(0.0f, 10.0f);
  const dhcl::SoftmaxParams p{out.data(), logits.data(), offsets.data(), rows};
  dhcl::run_softmax_rows(p);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0.0;
    for (int64_t e = offsets[r]; e < offsets[r + 1]; ++e) sum += out[e];
    harness::require(offsets[r] == offsets[r + 1] || std::abs(sum - 1.0) < 1e-5,
                     "weights add to 1");
  }
}

// Lists of neighbours, in which nobody stands twice, and a range of rows.
struct Lists {
  int64_t rows, width, begin, end;
  std::vector<int32_t> ranks;
  std::vector<int16_t> positions;

  explicit Lists(FuzzedDataProvider& in) {
    // More rows than one task holds where there are threads, else now and then.
    const bool many = dhcl::kParallelElements == 0 || in.ConsumeIntegralInRange<int>(0, 31) == 1;
    rows = in.ConsumeIntegralInRange<int64_t>(1, many ? 90 : 12);
    width = in.ConsumeIntegralInRange<int64_t>(1, std::min<int64_t>(rows, 9));
    // Neighbours lie near, so that many are mutual.
    const int64_t reach = in.ConsumeIntegralInRange<int64_t>(width, std::min<int64_t>(rows, 16));
    begin = in.ConsumeIntegralInRange<int64_t>(0, rows);
    end = in.ConsumeIntegralInRange<int64_t>(begin, rows);
    uint32_t state = in.ConsumeIntegral<uint32_t>();
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<int32_t> near;
      for (int64_t j = 0; j < reach; ++j)
        near.push_back(static_cast<int32_t>((i / reach * reach + j) % rows));
      for (int64_t q = 0; q < width; ++q) {
        state = state * 1664525u + 1013904223u;
        std::swap(near[q], near[q + (state >> 8) % (reach - q)]);
      }
      ranks.insert(ranks.end(), near.begin(), near.begin() + width);
    }
    positions.resize(ranks.size());
    dhcl::run_reciprocal_positions({positions.data(), ranks.data(), rows, width});
  }

  const int32_t* list(int64_t i) const { return ranks.data() + i * width; }
  // Those among the first k of i that have it among their first k.
  std::set<int32_t> mutual(int64_t i, int64_t k) const {
    std::set<int32_t> out;
    for (int64_t q = 0; q < k; ++q) {
      const int32_t* other = list(list(i)[q]);
      if (std::find(other, other + k, i) != other + k) out.insert(list(i)[q]);
    }
    return out;
  }
  template <typename Params>
  void give_to(Params& p) const {
    p.lines.begin = begin;
    p.lines.rows = end - begin;
    p.ranks = ranks.data();
    p.num_rows = rows;
    p.width = width;
  }
};

void sets(FuzzedDataProvider& in) {
  const Lists lists(in);
  dhcl::KReciprocalParams p{};
  lists.give_to(p);
  p.positions = lists.positions.data();
  p.k = in.ConsumeIntegralInRange<int64_t>(0, lists.width);
  p.half = in.ConsumeIntegralInRange<int64_t>(0, lists.width);
  const auto [offsets, columns, values] = dhcl::k_reciprocal_rows(harness::some_tensor(), p);
  std::vector<int64_t> starts{0};
  std::vector<int32_t> members;
  for (int64_t i = lists.begin; i < lists.end; ++i) {
    const std::set<int32_t> own = lists.mutual(i, p.k);
    std::set<int32_t> all = own;
    for (const int32_t c : own) {
      const std::set<int32_t> close = lists.mutual(c, p.half);
      const int64_t shared =
          std::count_if(close.begin(), close.end(), [&](int32_t j) { return own.count(j) > 0; });
      if (static_cast<double>(shared) > 2.0 / 3.0 * static_cast<double>(close.size()))
        all.insert(close.begin(), close.end());
    }
    members.insert(members.end(), all.begin(), all.end());
    starts.push_back(static_cast<int64_t>(members.size()));
  }
  harness::require(harness::holds(offsets, starts) && harness::holds(columns, members),
                   "mutual neighbours, with the close ones of those that share two thirds");
}

// Weighted sets of all rows.
struct Sets {
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> columns;
  std::vector<float> values;

  Sets(FuzzedDataProvider& in, int64_t rows) {
    const int64_t one_in = in.ConsumeIntegralInRange<int64_t>(1, 20);
    uint32_t state = in.ConsumeIntegral<uint32_t>();
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < rows; ++j) {
        state = state * 1664525u + 1013904223u;
        if ((state >> 8) % one_in == 0) columns.push_back(static_cast<int32_t>(j));
      }
      offsets.push_back(static_cast<int64_t>(columns.size()));
    }
    values = harness::some_floats(in, offsets.back());
  }
};

void expansion(FuzzedDataProvider& in) {
  const Lists lists(in);
  const Sets of(in, lists.rows);
  dhcl::QueryExpandParams p{};
  lists.give_to(p);
  p.offsets = of.offsets.data();
  p.columns = of.columns.data();
  p.values = of.values.data();
  p.k2 = in.ConsumeIntegralInRange<int64_t>(1, lists.width);
  const auto [offsets, columns, values] = dhcl::query_expand_rows(harness::some_tensor(), p);
  std::vector<int64_t> starts{0};
  std::vector<int32_t> members;
  std::vector<float> means;
  for (int64_t i = lists.begin; i < lists.end; ++i) {
    std::map<int32_t, float> sums;
    for (int64_t q = 0; q < p.k2; ++q) {
      const int64_t near = lists.list(i)[q];
      for (int64_t e = of.offsets[near]; e < of.offsets[near + 1]; ++e)
        sums[of.columns[e]] += of.values[e];
    }
    for (const auto& [column, sum] : sums) {
      members.push_back(column);
      means.push_back(sum / static_cast<float>(p.k2));
    }
    starts.push_back(static_cast<int64_t>(members.size()));
  }
  harness::require(harness::holds(offsets, starts) && harness::holds(columns, members) &&
                       harness::holds(values, means),
                   "the mean of the neighbours' sets");
}

void dots(FuzzedDataProvider& in) {
  const Lists lists(in);
  const Sets of(in, lists.rows);
  const int64_t dim = in.ConsumeIntegralInRange<int64_t>(0, 9);
  const std::vector<float> features = harness::some_floats(in, lists.rows * dim);
  const std::vector<float> similarities = harness::some_floats(in, lists.rows * lists.width);
  const bool known = in.ConsumeBool();
  std::vector<float> got(of.columns.size(), -7.0f), wanted;
  dhcl::PairDotsParams p{};
  p.dots = got.data();
  p.features = features.data();
  p.ranks = lists.ranks.data();
  p.similarities = known ? similarities.data() : nullptr;
  p.offsets = of.offsets.data();
  p.columns = of.columns.data();
  p.num_rows = p.rows = lists.rows;
  p.dim = dim;
  p.width = lists.width;
  dhcl::run_pair_dots(p);
  for (int64_t i = 0; i < lists.rows; ++i)
    for (int64_t e = of.offsets[i]; e < of.offsets[i + 1]; ++e) {
      const int32_t* const list = lists.list(i);
      const int64_t place = std::find(list, list + lists.width, of.columns[e]) - list;
      float columns[dhcl::kSumColumns] = {};
      for (int64_t j = 0; j < dim; ++j)
        columns[j] += features[i * dim + j] * features[of.columns[e] * dim + j];
      for (int64_t half = dhcl::kSumColumns / 2; half > 0; half /= 2)
        for (int64_t c = 0; c < half; ++c) columns[c] += columns[c + half];
      wanted.push_back(known && place < lists.width ? similarities[i * lists.width + place]
                                                    : columns[0]);
    }
  harness::require(harness::same(got, wanted), "similarities, looked up where they are known");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange<int>(0, 4)) {
    case 0:
      positions(in);
      break;
    case 1:
      weights(in);
      break;
    case 2:
      expansion(in);
      break;
    case 3:
      dots(in);
      break;
    default:
      sets(in);
  }
  return 0;
}
