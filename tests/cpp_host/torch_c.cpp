// The few functions of torch's C interface that the C++ half needs: threads, and tensors that are
// new, of one dimension, on the CPU. Threads are std::thread's: ThreadSanitizer follows these, and
// not OpenMP's.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace {
constexpr uint32_t kPool = 4;

// An allocation of its own of exactly its length, so that AddressSanitizer knows both ends.
struct Array {
  int64_t length = 0;
  int32_t dtype = 0;
  std::shared_ptr<char> bytes;
};
Array& array_of(AtenTensorHandle t) { return *reinterpret_cast<Array*>(t); }
AtenTensorHandle handle_of(Array* array) { return reinterpret_cast<AtenTensorHandle>(array); }

template <typename T>
T* pointer_of(StableIValue value) {
  return reinterpret_cast<T*>(value);
}
}  // namespace

// Numbers that stand for dtypes, devices and layouts; those of dtypes have their size in the lowest
// bits.
#define DHCL_NUMBER(name, number) \
  extern "C" int32_t aoti_torch_##name() { return number; }
#define DHCL_DTYPE(name, size) DHCL_NUMBER(dtype_##name, __COUNTER__ * 32 + size)
DHCL_DTYPE(uint8, 1)
DHCL_DTYPE(int8, 1)
DHCL_DTYPE(bool, 1)
DHCL_DTYPE(uint16, 2)
DHCL_DTYPE(int16, 2)
DHCL_DTYPE(uint32, 4)
DHCL_DTYPE(int32, 4)
DHCL_DTYPE(uint64, 8)
DHCL_DTYPE(int64, 8)
DHCL_DTYPE(float8_e5m2, 1)
DHCL_DTYPE(float8_e4m3fn, 1)
DHCL_DTYPE(float8_e5m2fnuz, 1)
DHCL_DTYPE(float8_e4m3fnuz, 1)
DHCL_DTYPE(float16, 2)
DHCL_DTYPE(bfloat16, 2)
DHCL_DTYPE(float32, 4)
DHCL_DTYPE(float64, 8)
DHCL_DTYPE(complex32, 4)
DHCL_DTYPE(complex64, 8)
DHCL_DTYPE(complex128, 16)
DHCL_NUMBER(device_type_cpu, 0)
DHCL_NUMBER(device_type_cuda, 1)
DHCL_NUMBER(device_type_meta, 2)
DHCL_NUMBER(device_type_xpu, 3)
DHCL_NUMBER(device_type_mps, 4)
DHCL_NUMBER(device_type_privateuse1, 5)
DHCL_NUMBER(layout_strided, 0)
DHCL_NUMBER(layout_sparse_coo, 1)
DHCL_NUMBER(layout_sparse_csr, 2)
DHCL_NUMBER(layout_sparse_csc, 3)
DHCL_NUMBER(layout_sparse_bsr, 4)
DHCL_NUMBER(layout_sparse_bsc, 5)
DHCL_NUMBER(layout__mkldnn, 6)
DHCL_NUMBER(layout_jagged, 7)

extern "C" {

uint64_t aoti_torch_abi_version() { return TORCH_TARGET_VERSION; }

AOTITorchError torch_get_num_threads(uint32_t* out_num_threads) {
  *out_num_threads = kPool;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc func,
                                  void* ctx) {
  std::vector<std::thread> pool;
  for (int64_t i = begin; i < end; ++i) pool.emplace_back(func, i, i + 1, ctx);
  for (std::thread& thread : pool) thread.join();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_new_uninitialized_tensor(AtenTensorHandle* out) {
  *out = handle_of(new Array());
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle from, AtenTensorHandle* out) {
  *out = handle_of(new Array(array_of(from)));
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete &array_of(tensor);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* out) {
  *out = array_of(tensor).dtype;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* out) {
  *out = array_of(tensor).length;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** out) {
  *out = array_of(tensor).bytes.get();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** out) {
  *out = array_of(tensor).bytes.get();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_new_list_reserve_size(size_t, StableListHandle* out) {
  *out = reinterpret_cast<StableListHandle>(new std::vector<StableIValue>());
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue value) {
  reinterpret_cast<std::vector<StableIValue>*>(list)->push_back(value);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete reinterpret_cast<std::vector<StableIValue>*>(list);
  return AOTI_TORCH_SUCCESS;
}

// new_empty alone, of one dimension and a dtype: what it is like, the lengths, the dtype, and three
// options that are not given. Whoever is called owns what is on the stack.
AOTITorchError torch_call_dispatcher(const char* op, const char*, StableIValue* stack, uint64_t) {
  if (std::strcmp(op, "aten::new_empty") != 0) std::abort();
  const std::unique_ptr<Array> like(pointer_of<Array>(stack[0]));
  const std::unique_ptr<std::vector<StableIValue>> sizes(
      pointer_of<std::vector<StableIValue>>(stack[1]));
  const std::unique_ptr<StableIValue> dtype(pointer_of<StableIValue>(stack[2]));
  if (sizes->size() != 1 || dtype == nullptr) std::abort();
  const int64_t length = static_cast<int64_t>(sizes->front());
  const int32_t number = static_cast<int32_t>(*dtype);
  const size_t bytes = length * (number % 32);
  const std::shared_ptr<char> memory(static_cast<char*>(std::malloc(bytes)), std::free);
  stack[0] = reinterpret_cast<StableIValue>(new Array{length, number, memory});
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
