// Positions in the neighbours' lists against looking them up, and weights of any logits.
// clang-format off: the harness comes first
#include "harness.h"
#include "reciprocal.cpp"
// clang-format on

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

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider in(data, size);
  in.ConsumeBool() ? positions(in) : weights(in);
  return 0;
}
