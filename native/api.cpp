// The door: every argument is checked here, once, and the instruction set is chosen.
#include <string.h>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <atomic>
#include <string>

#include "isas.h"
#include "step.h"

namespace loki {

#define LOKI_DECLARE(NAME)          \
  namespace NAME {                  \
  extern const Kernels kKernels;    \
  }
LOKI_FOR_EACH_ISA(LOKI_DECLARE)
#undef LOKI_DECLARE

namespace {

constexpr int64_t kMostDim = 1024;
constexpr int64_t kMostRows = INT32_MAX - 1024;

bool runs_here(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
                  __builtin_cpu_supports("movbe");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (!strcmp(name, "avx2")) return v3;
  if (!strcmp(name, "avx512base")) return v4;
  if (!strcmp(name, "avx512"))
    return v4 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
  (void)name;
  return true;
}

#if defined(__aarch64__) && defined(__linux__)
bool has_dot_product() { return getauxval(AT_HWCAP) & (1ul << 20); }
#elif defined(__aarch64__)
bool has_dot_product() { return true; }  // every Apple processor of this kind
#else
bool has_dot_product() { return true; }
#endif

const Kernels* const kAll[] = {
#define LOKI_ADDRESS(NAME) &NAME::kKernels,
    LOKI_FOR_EACH_ISA(LOKI_ADDRESS)
#undef LOKI_ADDRESS
};

bool usable(const Kernels* k) {
  return runs_here(k->name) && (strcmp(k->name, "neon_dotprod") != 0 || has_dot_product());
}

const Kernels* best() {
  for (const Kernels* k : kAll)
    if (usable(k)) return k;
  return kAll[0];
}

std::atomic<const Kernels*> chosen{nullptr};
std::atomic<const Kernels*> last{nullptr};

bool floats(int64_t dtype) { return dtype >= LOKI_F32 && dtype <= LOKI_F16; }

int check_rows(const loki_rows& rows) {
  if (rows.data == nullptr) return LOKI_NULL_POINTER;
  if (!floats(rows.dtype)) return LOKI_BAD_DTYPE;
  return rows.dim < 1 || rows.dim > kMostDim ? LOKI_BAD_SIZE : LOKI_OK;
}

int check_pages(const int32_t* table, int64_t stride, int64_t page_size, int64_t seq, bool tiled) {
  if (table == nullptr) return LOKI_OK;
  if (page_size < 1 || (tiled && page_size % kTileRows != 0)) return LOKI_BAD_SIZE;
  return stride * page_size < seq ? LOKI_BAD_SIZE : LOKI_OK;
}

// The bytes of coordinates that one row puts into a line of its tile, by kind.
int64_t per_line(int64_t kind) {
  switch (kind) {
    case LOKI_F32: return 1;
    case LOKI_BF16: return 2;
    case LOKI_INT8: return 4;
    case LOKI_INT4: return 8;
    default: return 0;
  }
}

int check_tiles(const loki_rows& lead, int64_t rank, const uint16_t* scales) {
  if (lead.data == nullptr) return LOKI_NULL_POINTER;
  const int64_t width = per_line(lead.dtype);
  if (width == 0) return LOKI_BAD_DTYPE;
  if (rank < 1 || rank > kMostDim || lead.dim != (rank + width - 1) / width) return LOKI_BAD_SIZE;
  if (lead.row_stride < lead.dim * kLineBytes) return LOKI_BAD_SIZE;
  return width >= 4 && scales == nullptr ? LOKI_NULL_POINTER : LOKI_OK;
}

int check_sizes(const loki_call& c) {
  if (c.batch < 1 || c.kv_heads < 1 || c.group < 1) return LOKI_BAD_SIZE;
  if (c.seq < 1 || c.seq > kMostRows) return LOKI_BAD_SIZE;
  for (int64_t b = 0; c.lengths != nullptr && b < c.batch; ++b)
    if (c.lengths[b] < 0 || c.lengths[b] > c.seq) return LOKI_BAD_SIZE;
  const bool tiled = c.lead_kind == LOKI_LEAD_TILES;
  return check_pages(c.block_table, c.table_stride, c.page_size, c.seq, tiled);
}

int check_lead(const loki_call& c) {
  if (c.lead_kind == LOKI_LEAD_RECENCY) return LOKI_OK;
  if (c.lead_kind != LOKI_LEAD_TILES && c.lead_kind != LOKI_LEAD_ROWS) return LOKI_BAD_DTYPE;
  if (c.lead_query == nullptr) return LOKI_NULL_POINTER;
  if (!floats(c.lead_query_dtype)) return LOKI_BAD_DTYPE;
  if (c.query_map != nullptr && (c.keys.dim < 1 || c.keys.dim > kMostDim)) return LOKI_BAD_SIZE;
  if (c.lead_kind == LOKI_LEAD_TILES) return check_tiles(c.lead, c.lead_rank, c.scales);
  if (const int bad = check_rows(c.lead)) return bad;
  return c.lead_rank < 1 || c.lead_rank > c.lead.dim ? LOKI_BAD_SIZE : LOKI_OK;
}

int check_reading(const loki_call& c) {
  if (c.query == nullptr || c.out == nullptr) return LOKI_NULL_POINTER;
  if (!floats(c.query_dtype)) return LOKI_BAD_DTYPE;
  if (const int bad = check_rows(c.keys)) return bad;
  return check_rows(c.values);
}

int check_choice(const loki_call& c) {
  if (c.indices == nullptr || c.counts == nullptr) return LOKI_NULL_POINTER;
  if (c.indices_width < 1 || c.sinks < 0 || c.recents < 0) return LOKI_BAD_SIZE;
  if (c.reduce < LOKI_REDUCE_SOFTMAX_SUM || c.reduce > LOKI_REDUCE_NONE) return LOKI_BAD_DTYPE;
  if (c.count < 0) return LOKI_BAD_SIZE;
  if (c.wanted == nullptr)
    return c.count > 0 || (c.mass > 0.0 && c.mass <= 1.0) ? LOKI_OK : LOKI_BAD_SIZE;
  for (int64_t b = 0; b < c.batch; ++b)
    if (c.wanted[b] < 0) return LOKI_BAD_SIZE;
  return LOKI_OK;
}

int check_indices(const loki_call& c) {
  if (c.indices == nullptr || c.counts == nullptr) return LOKI_NULL_POINTER;
  const bool alone = c.reduce == LOKI_REDUCE_NONE && c.group > 1;
  const int64_t choosers = alone ? c.kv_heads * c.group : c.kv_heads;
  for (int64_t i = 0; i < c.batch * choosers; ++i) {
    const int64_t rows = c.lengths == nullptr ? c.seq : c.lengths[i / choosers];
    if (c.counts[i] < 0 || c.counts[i] > c.indices_width || c.counts[i] > rows) return LOKI_BAD_SIZE;
    for (int64_t j = 0; j < c.counts[i]; ++j) {
      const int64_t row = c.indices[i * c.indices_width + j];
      if (row < 0 || row >= rows) return LOKI_BAD_INDEX;
    }
  }
  return LOKI_OK;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load();
  if (k == nullptr) {
    k = best();
    chosen.store(k);
  }
  last.store(k);
  return *k;
}

}  // namespace loki

using namespace loki;

extern "C" {

int loki_score(const loki_call* call) {
  if (call == nullptr || call->scores == nullptr) return LOKI_NULL_POINTER;
  if (const int bad = check_sizes(*call)) return bad;
  if (call->lead_kind == LOKI_LEAD_RECENCY) return LOKI_BAD_DTYPE;
  if (const int bad = check_lead(*call)) return bad;
  return run(*call, Work::kScore);
}

int loki_attend(const loki_call* call) {
  if (call == nullptr) return LOKI_NULL_POINTER;
  if (const int bad = check_sizes(*call)) return bad;
  if (const int bad = check_reading(*call)) return bad;
  if (const int bad = check_indices(*call)) return bad;
  return run(*call, Work::kAttend);
}

int loki_dense(const loki_call* call) {
  if (call == nullptr) return LOKI_NULL_POINTER;
  if (const int bad = check_sizes(*call)) return bad;
  if (const int bad = check_reading(*call)) return bad;
  return run(*call, Work::kDense);
}

int loki_step(const loki_call* call) {
  if (call == nullptr) return LOKI_NULL_POINTER;
  if (const int bad = check_sizes(*call)) return bad;
  if (const int bad = check_lead(*call)) return bad;
  if (const int bad = check_reading(*call)) return bad;
  if (const int bad = check_choice(*call)) return bad;
  return run(*call, Work::kStep);
}

int loki_choose(const loki_choose_call* call) {
  if (call == nullptr || call->scores == nullptr || call->counts == nullptr) return LOKI_NULL_POINTER;
  if (call->batch < 1 || call->choosers < 1 || call->seq < 1 || call->seq > kMostRows)
    return LOKI_BAD_SIZE;
  if (call->mass > 1.0) return LOKI_BAD_SIZE;
  if (call->mass > 0.0) return run_choose(*call);
  if (call->wanted == nullptr || call->indices == nullptr) return LOKI_NULL_POINTER;
  if (call->indices_width < 1) return LOKI_BAD_SIZE;
  for (int64_t i = 0; i < call->batch * call->choosers; ++i)
    if (call->wanted[i] < 0) return LOKI_BAD_SIZE;
  return run_choose(*call);
}

int loki_append(const loki_append_call* call) {
  if (call == nullptr) return LOKI_NULL_POINTER;
  const loki_append_call& c = *call;
  if (c.batch < 1 || c.kv_heads < 1 || c.tokens < 1 || c.start < 0) return LOKI_BAD_SIZE;
  if (c.start + c.tokens > kMostRows) return LOKI_BAD_SIZE;
  if (const int bad = check_rows(c.new_keys)) return bad;
  if (const int bad = check_rows(c.new_values)) return bad;
  if (c.keys.data != nullptr && (c.keys.dtype != c.new_keys.dtype || c.keys.dim != c.new_keys.dim))
    return LOKI_BAD_SIZE;
  if (c.values.data != nullptr &&
      (c.values.dtype != c.new_values.dtype || c.values.dim != c.new_values.dim))
    return LOKI_BAD_SIZE;
  const bool leads = c.key_map != nullptr;
  if (leads)
    if (const int bad = check_tiles(c.lead, c.lead_rank, c.scales)) return bad;
  if (const int bad = check_pages(c.block_table, c.table_stride, c.page_size, c.start + c.tokens, leads))
    return bad;
  return run_append(c);
}

int loki_column_sums(const loki_column_call* call) {
  if (call == nullptr) return LOKI_NULL_POINTER;
  const loki_column_call& c = *call;
  if (c.query == nullptr || c.out == nullptr) return LOKI_NULL_POINTER;
  if (c.batch < 1 || c.kv_heads < 1 || c.group < 1 || c.seq < 1 || c.seq > kMostRows)
    return LOKI_BAD_SIZE;
  if (c.q_len < 1 || c.q_len > kMostRows || c.window < 1 || c.window > c.q_len) return LOKI_BAD_SIZE;
  if (c.visible == nullptr && c.q_len > c.seq) return LOKI_BAD_SIZE;
  if (!floats(c.query_dtype)) return LOKI_BAD_DTYPE;
  if (const int bad = check_rows(c.keys)) return bad;
  return run_columns(c);
}

int loki_hamming(const loki_hamming_call* call) {
  if (call == nullptr) return LOKI_NULL_POINTER;
  const loki_hamming_call& c = *call;
  if (c.query == nullptr || c.codes == nullptr || c.out == nullptr) return LOKI_NULL_POINTER;
  if (c.batch < 1 || c.kv_heads < 1 || c.group < 1 || c.seq < 1 || c.seq > kMostRows)
    return LOKI_BAD_SIZE;
  if (c.q_len < 1 || c.q_len > kMostRows || c.words < 1 || c.words > kMostDim) return LOKI_BAD_SIZE;
  return run_hamming(c);
}

int loki_abi(void) { return LOKI_ATTN_ABI; }

const char* loki_isas(void) {
  static const std::string names = [] {
    std::string all;
    for (const Kernels* k : kAll)
      if (usable(k)) all += (all.empty() ? "" : ",") + std::string(k->name);
    return all;
  }();
  return names.c_str();
}

const char* loki_isa(void) {
  const Kernels* k = chosen.load();
  return (k == nullptr ? best() : k)->name;
}

const char* loki_last_isa(void) {
  const Kernels* k = last.load();
  return k == nullptr ? "" : k->name;
}

int loki_set_isa(const char* name) {
  if (name == nullptr) return LOKI_NULL_POINTER;
  for (const Kernels* k : kAll)
    if (usable(k) && !strcmp(k->name, name)) {
      chosen.store(k);
      return LOKI_OK;
    }
  return LOKI_BAD_ISA;
}
}
