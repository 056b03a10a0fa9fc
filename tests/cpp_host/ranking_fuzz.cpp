// Ranks of matches against counting, on any distances and any lists of members.
// clang-format off: the harness comes first
#include "harness.h"
#include "ranking.cpp"
// clang-format on

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider in(data, size);
  const int64_t queries = in.ConsumeIntegralInRange<int64_t>(0, 12);
  const int64_t gallery = in.ConsumeIntegralInRange<int64_t>(1, 40);
  std::vector<float> distance(queries * gallery);
  // NaN is refused before.
  for (float& x : distance) {
    x = harness::some_float(in);
    if (std::isnan(x)) x = 7.0f;
  }
  std::vector<int64_t> members(gallery), begin(queries), offsets(queries + 1, 0);
  const bool wild = in.ConsumeProbability<float>() < 0.1f;
  for (int64_t g = 0; g < gallery; ++g)
    members[g] = wild ? in.ConsumeIntegralInRange<int64_t>(-1, gallery) : (g * 7 + 3) % gallery;
  const bool permuted = !wild && gallery % 7 != 0;
  for (int64_t q = 0; q < queries; ++q) {
    begin[q] = in.ConsumeIntegralInRange<int64_t>(0, gallery - 1);
    offsets[q + 1] = offsets[q] + in.ConsumeIntegralInRange<int64_t>(0, gallery - begin[q]);
  }
  std::vector<int64_t> query_cameras(queries), gallery_cameras(gallery);
  for (int64_t& c : query_cameras) c = in.ConsumeIntegralInRange<int>(0, 1);
  for (int64_t& c : gallery_cameras) c = in.ConsumeIntegralInRange<int>(0, 2);
  std::vector<int64_t> ranks(offsets[queries], -7);
  dhcl::MatchRanksParams p{};
  p.ranks = ranks.data();
  p.distance = distance.data();
  p.members = members.data();
  p.begin = begin.data();
  p.offsets = offsets.data();
  p.query_cameras = query_cameras.data();
  p.gallery_cameras = gallery_cameras.data();
  p.num_queries = queries;
  p.num_gallery = gallery;
  const std::string error = harness::error_of([&] { dhcl::run_match_ranks(p); });
  if (!permuted) return 0;
  harness::require(error.empty(), "members are good");
  for (int64_t q = 0; q < queries; ++q) {
    const float* row = distance.data() + q * gallery;
    for (int64_t i = offsets[q]; i < offsets[q + 1]; ++i) {
      const int64_t match = members[begin[q] + i - offsets[q]];
      const auto removed = [&](int64_t at) { return gallery_cameras[at] == query_cameras[q]; };
      int64_t rank = 1;
      std::vector<bool> own(gallery, false);
      for (int64_t j = offsets[q]; j < offsets[q + 1]; ++j)
        own[members[begin[q] + j - offsets[q]]] = true;
      for (int64_t g = 0; g < gallery; ++g)
        rank +=
            (row[g] < row[match] || (row[g] == row[match] && g < match)) && !(own[g] && removed(g));
      harness::require(ranks[i] == (removed(match) ? 0 : rank), "the rank of a match");
    }
  }
  return 0;
}
