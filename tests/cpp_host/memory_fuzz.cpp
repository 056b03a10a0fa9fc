// The bank's update and the class means against one row after another, in the bits of every dtype.
// clang-format off: the harness comes first
#include "harness.h"
#include "memory.cpp"
// clang-format on

namespace {

using harness::same;

template <typename A>
A plain_norm(const std::vector<A>& x) {
  A columns[dhcl::kSumColumns] = {};
  for (size_t j = 0; j < x.size(); ++j) columns[j % dhcl::kSumColumns] += x[j] * x[j];
  for (int64_t half = dhcl::kSumColumns / 2; half > 0; half /= 2)
    for (int64_t c = 0; c < half; ++c) columns[c] += columns[c + half];
  return std::sqrt(columns[0]);
}

template <typename T>
std::vector<T> some_rows(FuzzedDataProvider& in, int64_t size) {
  const std::vector<float> x = harness::some_floats(in, size);
  return {x.begin(), x.end()};
}

template <typename BankT, typename FeatureT>
void momentum(FuzzedDataProvider& in, dhcl::Dtype bank_dtype, dhcl::Dtype feature_dtype) {
  const int64_t rows = in.ConsumeIntegralInRange<int64_t>(1, 12);
  const int64_t dim = in.ConsumeIntegralInRange<int64_t>(0, 150);
  const int64_t batch = in.ConsumeIntegralInRange<int64_t>(0, 20);
  const bool wild = in.ConsumeProbability<float>() < 0.1f;
  std::vector<int64_t> indices(batch);
  for (int64_t& i : indices) i = in.ConsumeIntegralInRange<int64_t>(wild ? -1 : 0, rows - !wild);
  std::vector<BankT> bank = some_rows<BankT>(in, rows * dim), wanted = bank;
  const std::vector<FeatureT> features = some_rows<FeatureT>(in, batch * dim);
  int64_t skipped = 3;
  dhcl::MomentumParams p{};
  p.bank = bank.data();
  p.features = features.data();
  p.indices = indices.data();
  p.skipped = &skipped;
  p.num_rows = rows;
  p.batch = batch;
  p.dim = dim;
  p.momentum = static_cast<float>(in.ConsumeIntegralInRange<int>(0, 4)) / 4.0f;
  p.one_minus_momentum = 1.0f - p.momentum;
  p.eps = in.ConsumeBool() ? 0.0f : 1e-12f;
  p.bank_dtype = bank_dtype;
  p.feature_dtype = feature_dtype;
  const std::string error = harness::error_of([&] { dhcl::run_momentum_update(p); });
  int64_t left = 3;
  for (int64_t b = 0; b < batch && error.empty() && dim > 0; ++b) {
    BankT* const row = wanted.data() + indices[b] * dim;
    std::vector<float> mixed(dim);
    for (int64_t j = 0; j < dim; ++j)
      mixed[j] = p.momentum * static_cast<float>(row[j]) +
                 p.one_minus_momentum * static_cast<float>(features[b * dim + j]);
    const float length = plain_norm(mixed);
    const float divisor = length < p.eps ? p.eps : length;
    if (!std::isfinite(length) || divisor == 0.0f)
      ++left;
    else
      for (int64_t j = 0; j < dim; ++j) row[j] = static_cast<BankT>(mixed[j] / divisor);
  }
  const auto outside = [&](int64_t i) { return i < 0 || i >= rows; };
  harness::require(error.empty() != std::any_of(indices.begin(), indices.end(), outside),
                   "indices outside the bank are refused, and no others");
  harness::require(skipped == left, "what leaves its row alone is counted");
  harness::require(same(bank, wanted), "the bank after each of the batch in turn");
}

// Classes of rows, in the form that the ops take: members of classes, then rows of no class.
struct Classes {
  std::vector<int64_t> members, offsets{0};
  int64_t count() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t size(int64_t k) const { return offsets[k + 1] - offsets[k]; }

  explicit Classes(FuzzedDataProvider& in) {
    const int64_t classes = in.ConsumeIntegralInRange<int64_t>(0, 40);
    // Rarely one that is summed in many runs, or shared by threads.
    const int64_t runs = in.ConsumeIntegralInRange<int>(0, 255);
    for (int64_t k = 0; k < classes; ++k) {
      int64_t size = in.ConsumeIntegralInRange<int64_t>(0, 6);
      if (k == 0 && runs > 250) size += 256 * (runs == 255 ? 16 : runs - 250);
      offsets.push_back(offsets.back() + size);
    }
    const int64_t rows = offsets.back() + in.ConsumeIntegralInRange<int64_t>(0, 3);
    members.resize(rows);
    std::iota(members.begin(), members.end(), 0);
    uint32_t state = in.ConsumeIntegral<uint32_t>();
    for (int64_t i = rows - 1; i > 0; --i) {
      state = state * 1664525u + 1013904223u;
      std::swap(members[i], members[(state >> 8) % (i + 1)]);
    }
  }
};

template <typename T, typename A>
std::vector<T> plain_mean(const Classes& of, const std::vector<T>& rows, int64_t dim, int64_t k,
                          bool normalize) {
  std::vector<T> mean(dim);
  for (int64_t j = 0; j < dim; ++j) {
    A total = 0, part = 0;
    for (int64_t i = 0; i < of.size(k); ++i) {
      part += static_cast<A>(rows[of.members[of.offsets[k] + i] * dim + j]);
      if (i + 1 < of.size(k) && (i + 1) % dhcl::kRunLength != 0) continue;
      total = i < dhcl::kRunLength ? part : total + part;
      part = 0;
    }
    mean[j] = static_cast<T>(of.size(k) == 0 ? total : total / static_cast<A>(of.size(k)));
  }
  if (!normalize) return mean;
  const std::vector<A> wide(mean.begin(), mean.end());
  const A length = plain_norm(wide);
  const A divisor = length < A(dhcl::kMeanEps) ? A(dhcl::kMeanEps) : length;
  for (int64_t j = 0; j < dim; ++j) mean[j] = static_cast<T>(wide[j] / divisor);
  return mean;
}

template <typename T, typename A>
void means(FuzzedDataProvider& in, dhcl::Dtype dtype) {
  const Classes of(in);
  const int64_t n = static_cast<int64_t>(of.members.size());
  // A giant class of more columns than a slice has where there are threads; elsewhere that is slow.
  const int64_t most = n < 4000 ? 9 : dhcl::kParallelElements == 0 ? 300 : 2;
  const int64_t dim = in.ConsumeIntegralInRange<int64_t>(0, most);
  const std::vector<T> rows = some_rows<T>(in, n * dim);
  std::vector<T> got = some_rows<T>(in, of.count() * dim), wanted = got;
  std::vector<int64_t> listed(in.ConsumeIntegralInRange<int64_t>(1, 6)), class_of(n, -1);
  // Of no rows there is no list of their classes: an empty one has no address.
  const bool by_list = in.ConsumeBool(), by_row = by_list && n > 0 && in.ConsumeBool();
  for (int64_t k = 0; k < of.count(); ++k)
    for (int64_t i = of.offsets[k]; i < of.offsets[k + 1]; ++i) class_of[of.members[i]] = k;
  for (int64_t& i : listed) i = in.ConsumeIntegralInRange<int64_t>(-1, by_row ? n : of.count());
  dhcl::SegmentMeanParams p{};
  p.means = got.data();
  p.rows = rows.data();
  p.members = of.members.data();
  p.offsets = of.offsets.data();
  p.listed = by_list ? listed.data() : nullptr;
  p.class_of = by_row ? class_of.data() : nullptr;
  p.num_listed = static_cast<int64_t>(listed.size());
  p.num_rows = n;
  p.num_classes = of.count();
  p.dim = dim;
  p.normalize = in.ConsumeBool();
  p.dtype = dtype;
  const std::string error = harness::error_of([&] { dhcl::run_segment_mean(p); });
  std::vector<bool> fresh(of.count(), !by_list);
  bool good = true;
  for (int64_t i : by_list&& dim > 0 ? listed : std::vector<int64_t>()) {
    if (by_row) i = i < 0 || i >= n ? -1 : class_of[i];
    good &= i >= 0 && i < of.count();
    if (good) fresh[i] = true;
  }
  harness::require(error.empty() == good, "classes that are none are refused, and no others");
  for (int64_t k = 0; k < of.count() && good; ++k) {
    if (!fresh[k]) continue;
    const std::vector<T> mean = plain_mean<T, A>(of, rows, dim, k, p.normalize);
    std::copy(mean.begin(), mean.end(), wanted.begin() + k * dim);
  }
  harness::require(same(got, wanted), "the means of the classes that are asked for");
}

template <typename T, typename A>
void gradient(FuzzedDataProvider& in, dhcl::Dtype dtype) {
  const Classes of(in);
  const int64_t n = static_cast<int64_t>(of.members.size());
  const int64_t dim = in.ConsumeIntegralInRange<int64_t>(0, 9);
  const std::vector<T> grad = some_rows<T>(in, of.count() * dim);
  std::vector<T> got(n * dim, T(7.0f)), wanted(n * dim, T(0.0f));
  for (int64_t k = 0; k < of.count(); ++k)
    for (int64_t i = of.offsets[k]; i < of.offsets[k + 1]; ++i)
      for (int64_t j = 0; j < dim; ++j)
        wanted[of.members[i] * dim + j] =
            static_cast<T>(static_cast<A>(grad[k * dim + j]) / static_cast<A>(of.size(k)));
  const dhcl::SegmentMeanBackwardParams p{
      got.data(), grad.data(), of.members.data(), of.offsets.data(), n, of.count(), dim, dtype};
  dhcl::run_segment_mean_backward(p);
  harness::require(same(got, wanted), "every member gets its share");
}

template <typename T, typename A>
void of_dtype(FuzzedDataProvider& in, dhcl::Dtype dtype) {
  in.ConsumeBool() ? means<T, A>(in, dtype) : gradient<T, A>(in, dtype);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using dhcl::BFloat16, dhcl::Dtype, dhcl::Half;
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange<int>(0, 8)) {
    case 0:
      momentum<Half, float>(in, Dtype::kFloat16, Dtype::kFloat32);
      break;
    case 1:
      momentum<BFloat16, Half>(in, Dtype::kBFloat16, Dtype::kFloat16);
      break;
    case 2:
      momentum<float, BFloat16>(in, Dtype::kFloat32, Dtype::kBFloat16);
      break;
    case 3:
      of_dtype<Half, float>(in, Dtype::kFloat16);
      break;
    case 4:
      of_dtype<BFloat16, float>(in, Dtype::kBFloat16);
      break;
    case 5:
      of_dtype<double, double>(in, Dtype::kFloat64);
      break;
    case 6:
      of_dtype<float, float>(in, Dtype::kFloat32);
      break;
    default:
      momentum<float, float>(in, Dtype::kFloat32, Dtype::kFloat32);
  }
  return 0;
}
