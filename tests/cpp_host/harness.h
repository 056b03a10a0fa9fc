// What the fuzz targets share: a family's .cpp is included as it is, so that its functions on plain
// arrays can be called, and nothing of it is registered with torch, which is not linked.
#pragma once
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "common/torch_glue.h"

// A template that nothing instantiates: the glue stays uncompiled.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, module) \
  template <typename Unused>                            \
  void registered_for_##key(Unused& module)

namespace harness {

/// Ends the run, with the input kept by libFuzzer, if a result is wrong.
inline void require(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong result: %s\n", what);
  std::abort();
}

/// The error of a call that must not fail in another way; empty if there is none.
template <typename Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    require(std::string(error.what()).find(": ") != std::string::npos, "an error names its op");
    return error.what();
  }
  return {};
}

/// A number of which many are equal, some are large, tiny, infinite or none; a small one where the
/// input has come to its end.
inline float some_float(FuzzedDataProvider& in) {
  switch (in.ConsumeIntegralInRange<int>(0, 7)) {
    case 4:
      return std::numeric_limits<float>::infinity();
    case 5:
      return std::numeric_limits<float>::quiet_NaN();
    case 6:
      return in.ConsumeFloatingPoint<float>();
    case 7:
      return -0.0f;
    default:
      return static_cast<float>(in.ConsumeIntegralInRange<int>(-2, 2));
  }
}

/// n of a few such numbers, in an order that takes no bytes of the input.
inline std::vector<float> some_floats(FuzzedDataProvider& in, int64_t n) {
  float few[6];
  for (float& x : few) x = some_float(in);
  uint32_t state = in.ConsumeIntegral<uint32_t>();
  std::vector<float> out(n);
  for (float& x : out) {
    state = state * 1664525u + 1013904223u;
    x = few[(state >> 16) % 6];
  }
  return out;
}

/// Whether two arrays hold equal numbers, of which none is equal to none.
template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](T x, T y) { return x == y || (x != x && y != y); });
}

/// An empty tensor, for code that makes new ones like it.
inline torch::stable::Tensor some_tensor() { return dhcl::new_int64(torch::stable::Tensor(), 0); }

/// Whether a tensor holds exactly these numbers.
template <typename T>
bool holds(const torch::stable::Tensor& t, const std::vector<T>& wanted) {
  const T* const data = t.const_data_ptr<T>();
  return same(std::vector<T>(data, data + t.numel()), wanted);
}

}  // namespace harness
