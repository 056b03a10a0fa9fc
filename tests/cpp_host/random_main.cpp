// Calls a fuzz target with random bytes. libFuzzer itself counts what was covered in plain bytes
// that all threads write, which ThreadSanitizer would report.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 1;
  std::mt19937 random(1);
  for (int i = 0; i < runs; ++i) {
    std::vector<uint8_t> bytes(random() % 4096);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::fprintf(stderr, "Done %d runs\n", runs);
}
