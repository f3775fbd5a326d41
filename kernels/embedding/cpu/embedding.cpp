#include "embedding.h"

#include <omp.h>

#include <cstring>

#include "linear/cpu/matmul.h"

namespace {

// In a panel, a row's depths lie one panel step apart: 16 columns of one float, or of one pair of 16-bit values: 64 bytes both.
void gather_row(const char* panel, int64_t lane, int64_t k, int32_t dtype, char* out) {
  constexpr int64_t kStep = 64;
  const char* from = panel + lane * 4;
  const int64_t words = dtype == LLMC_FLOAT32 ? k : k / 2;
  for (int64_t i = 0; i < words; i++) memcpy(out + i * 4, from + i * kStep, 4);
  if (dtype != LLMC_FLOAT32 && k % 2) memcpy(out + words * 4, from + words * kStep, 2);
}

}  // namespace

int32_t llmc_embedding(const LlmcEmbeddingArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcEmbeddingArgs)) return LLMC_BAD_STRUCT;
  if (a->dtype < LLMC_FLOAT32 || a->dtype > LLMC_BFLOAT16) return LLMC_BAD_DTYPE;
  if (a->count < 0 || a->num_rows < 1 || a->k < 1 || a->num_threads < 0) return LLMC_BAD_SHAPE;
  if (a->count > 1 && a->y_stride < a->k) return LLMC_BAD_SHAPE;
  for (int64_t i = 0; i < a->count; i++)
    if (a->ids[i] < 0 || a->ids[i] >= a->num_rows) return LLMC_BAD_INDEX;

  const int64_t item = a->dtype == LLMC_FLOAT32 ? 4 : 2;
  const int64_t panel_bytes = llmc::packed_bytes(LLMC_PACK_N, a->k, a->dtype);
  const int threads = a->count < 8 ? 1 : llmc::num_threads_for(a->num_threads, a->count * a->k * 32, 0);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a->count; i++) {
    const char* panel = static_cast<const char*>(a->weight) + a->ids[i] / LLMC_PACK_N * panel_bytes;
    gather_row(panel, a->ids[i] % LLMC_PACK_N, a->k, a->dtype, static_cast<char*>(a->y) + i * a->y_stride * item);
  }
  return LLMC_OK;
}
