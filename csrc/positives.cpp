// Hard positives on the CPU, and the glue that registers the CPU and CUDA kernels with torch. What
// is chosen is in positives.h; the CUDA kernel is in positives.cu.
#include "positives.h"

#include <cmath>
#include <vector>

#include "common/cpu.h"

namespace dhcl {
namespace {

DHCL_CLONES float dot(const float* x, const float* y, int64_t d) {
  return sum_of_products(x, y, d);
}

const float* widened(const float* row, int64_t, std::vector<float>&) { return row; }
template <typename T>
const float* widened(const T* row, int64_t d, std::vector<float>& scratch) {
  scratch.resize(d);
  for (int64_t j = 0; j < d; ++j) scratch[j] = static_cast<float>(row[j]);
  return scratch.data();
}

// The members of the class of a feature, after a look at every number that leads to them.
struct Members {
  int64_t own, begin, end;
};

Members members_of(const HardestPositiveParams& p, int64_t b) {
  const char* op = "hardest_positive";
  const int64_t own = p.indices[b];
  check(own >= 0 && own < p.num_rows, op, ": indices must be in [0, ", p.num_rows, ") (got ", own,
        " at batch position ", b, ")");
  const int64_t k = p.class_of[own];
  check(k >= 0 && k < p.num_classes, op, ": class_of must be in [0, ", p.num_classes, ") (got ", k,
        " at row ", own, ")");
  const int64_t begin = p.offsets[k], end = p.offsets[k + 1];
  check(0 <= begin && begin <= end && end <= p.num_rows, op, ": offsets must ascend in [0, ",
        p.num_rows, "] (got ", begin, " and ", end, " for class ", k, ")");
  return {own, begin, end};
}

template <typename T>
int64_t hardest_of(const HardestPositiveParams& p, int64_t b, const Members& range) {
  thread_local std::vector<float> scratch;
  const float* feature = p.features + b * p.dim;
  float least = HUGE_VALF;
  int64_t found = range.own;
  for (int64_t j = range.begin; j < range.end; ++j) {
    const int64_t member = p.members[j];
    check(member >= 0 && member < p.num_rows, "hardest_positive: members must be in [0, ",
          p.num_rows, ") (got ", member, " at place ", j, ")");
    if (p.cameras != nullptr && p.cameras[member] == p.cameras[range.own]) continue;
    const T* row = static_cast<const T*>(p.bank) + member * p.dim;
    const float similarity = dot(feature, widened(row, p.dim, scratch), p.dim);
    if (similarity < least) {
      least = similarity;
      found = member;
    }
  }
  return found;
}

void run_hardest_positive(const HardestPositiveParams& p) {
  std::vector<Members> ranges;
  int64_t members = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    ranges.push_back(members_of(p, b));
    members += ranges.back().end - ranges.back().begin;
  }
  parallel_tasks(p.batch, 1, members * p.dim, [&](int64_t b) {
    switch (p.dtype) {
      case BankDtype::kFloat16:
        p.rows[b] = hardest_of<Half>(p, b, ranges[b]);
        return;
      case BankDtype::kBFloat16:
        p.rows[b] = hardest_of<BFloat16>(p, b, ranges[b]);
        return;
      default:
        p.rows[b] = hardest_of<float>(p, b, ranges[b]);
    }
  });
}

BankDtype bank_dtype(const char* op, const Tensor& bank) {
  switch (bank.scalar_type()) {
    case ScalarType::Float:
      return BankDtype::kFloat32;
    case ScalarType::Half:
      return BankDtype::kFloat16;
    case ScalarType::BFloat16:
      return BankDtype::kBFloat16;
    default:
      check(false, op, ": bank must be float32, float16 or bfloat16");
      return BankDtype::kFloat32;
  }
}

Tensor integers(const char* op, const char* name, const Tensor& t, int64_t size) {
  check_int64(op, name, t);
  check(t.dim() == 1 && (size < 0 || t.size(0) == size), op, ": ", name, " has the wrong shape");
  return torch::stable::contiguous(t);
}

template <typename Device>
Tensor hardest_positive(const Tensor& features_in, const Tensor& bank_in, const Tensor& indices_in,
                        const Tensor& class_of_in, const Tensor& members_in,
                        const Tensor& offsets_in, const std::optional<Tensor>& cameras_in) {
  const char* op = "hardest_positive";
  check_rank(op, "features", features_in, 2);
  check_rank(op, "bank", bank_in, 2);
  check_float(op, "features", features_in);
  check(features_in.size(1) == bank_in.size(1), op, ": features and bank must have one width");
  const int64_t n = bank_in.size(0);
  const Tensor features = torch::stable::contiguous(features_in);
  const Tensor bank = torch::stable::contiguous(bank_in);
  const Tensor indices = integers(op, "indices", indices_in, features.size(0));
  const Tensor class_of = integers(op, "class_of", class_of_in, n);
  const Tensor members = integers(op, "members", members_in, n);
  const Tensor offsets = integers(op, "offsets", offsets_in, -1);
  check(offsets.size(0) >= 1, op, ": offsets must not be empty");
  std::optional<Tensor> cameras;
  if (cameras_in) cameras = integers(op, "cameras", *cameras_in, n);
  const Tensor rows = new_int64(features, features.size(0));
  HardestPositiveParams p{};
  p.rows = int64_out(rows);
  p.features = float_data(features);
  p.bank = bank.const_data_ptr();
  p.indices = int64_data(indices);
  p.class_of = int64_data(class_of);
  p.members = int64_data(members);
  p.offsets = int64_data(offsets);
  p.cameras = cameras ? int64_data(*cameras) : nullptr;
  p.batch = features.size(0);
  p.num_rows = n;
  p.num_classes = offsets.size(0) - 1;
  p.dim = features.size(1);
  p.dtype = bank_dtype(op, bank);
  Device::template run<run_hardest_positive, launch_hardest_positive>(features, p);
  return rows;
}

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("hardest_positive", TORCH_BOX(&hardest_positive<Device>));
}

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) { dhcl::register_ops<dhcl::Cpu>(m); }

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) { dhcl::register_ops<dhcl::Cuda>(m); }
#endif
