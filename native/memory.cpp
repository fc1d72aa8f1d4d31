// What the memory itself can do.
#include <vector>

#include "step.h"

namespace loki {
namespace {

constexpr int64_t kSlices = 64;

struct Reading {
  const char* data;
  int64_t bytes;
  const Kernels& k;
  std::vector<uint64_t> sums;
};

void read_slice(void* context, int64_t index) {
  Reading& r = *static_cast<Reading*>(context);
  const int64_t slice = r.bytes / kSlices / 256 * 256;
  r.sums[static_cast<size_t>(index)] = r.k.sum_bytes(r.data + index * slice, slice);
}

}  // namespace
}  // namespace loki

extern "C" {

int loki_read(const void* data, int64_t bytes, uint64_t* sum) {
  if (data == nullptr || sum == nullptr) return LOKI_NULL_POINTER;
  if (bytes < loki::kSlices * 256) return LOKI_BAD_SIZE;
  loki::Reading reading{static_cast<const char*>(data), bytes, loki::kernels(),
                        std::vector<uint64_t>(loki::kSlices)};
  loki::parallel(loki::kSlices, loki::read_slice, &reading);
  *sum = 0;
  for (uint64_t s : reading.sums) *sum += s;
  return LOKI_OK;
}
}
