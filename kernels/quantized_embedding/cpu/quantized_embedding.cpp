#include "quantized_embedding.h"

#include <omp.h>

#include <algorithm>

#include "linear/cpu/quants.h"
#include "linear/cpu/matmul.h"

namespace {

// The signed integer of one column and depth in a panel; the layout is that of quants.h.
int32_t quant_at(const uint8_t* panel, int64_t lane, int64_t depth, int32_t bits) {
  const int64_t pair = depth / 2 * 16 + lane;
  if (bits == 8) return static_cast<const int8_t*>(static_cast<const void*>(panel))[pair * 2 + depth % 2];
  return (panel[pair] >> (depth % 2 * 4) & 15) - 8;
}

template <class D>
void gather_row(const uint8_t* panel, const typename D::Element* scales, int64_t lane, const LlmcQuantizedEmbeddingArgs& a,
                typename D::Element* out) {
  for (int64_t begin = 0; begin < a.k; begin += 16) {  // sixteen depths never straddle a group of a multiple of 32
    const float scale = D::widen(scales[begin / a.group * 16 + lane]);
    const int64_t count = std::min<int64_t>(16, a.k - begin);
    float values[16] = {};
    for (int64_t i = 0; i < count; i++) values[i] = (float)quant_at(panel, lane, begin + i, a.bits) * scale;
    llmc::store_columns<D>(out + begin, llmc::lanes_load(values), count);
  }
}

template <class D>
void gather(const LlmcQuantizedEmbeddingArgs& a) {
  using Element = typename D::Element;
  const int64_t panel_bytes = llmc::quantized_bytes(LLMC_PACK_N, a.k, a.bits), groups = (a.k + a.group - 1) / a.group;
  const int threads = a.count < 8 ? 1 : llmc::num_threads_for(a.num_threads, a.count * a.k * 32, 0);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t panel = a.ids[i] / LLMC_PACK_N;
    gather_row<D>(static_cast<const uint8_t*>(a.weight) + panel * panel_bytes,
                  static_cast<const Element*>(a.scales) + panel * groups * LLMC_PACK_N, a.ids[i] % LLMC_PACK_N, a,
                  static_cast<Element*>(a.y) + i * a.y_stride);
  }
}

}  // namespace

int32_t llmc_quantized_embedding(const LlmcQuantizedEmbeddingArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcQuantizedEmbeddingArgs)) return LLMC_BAD_STRUCT;
  if (a->dtype < LLMC_FLOAT32 || a->dtype > LLMC_BFLOAT16 || (a->bits != 8 && a->bits != 4)) return LLMC_BAD_DTYPE;
  if (a->count < 0 || a->num_rows < 1 || a->k < 1 || a->num_threads < 0 || a->group < 1 || a->group % LLMC_PACK_K) return LLMC_BAD_SHAPE;
  if (a->count > 1 && a->y_stride < a->k) return LLMC_BAD_SHAPE;
  for (int64_t i = 0; i < a->count; i++)
    if (a->ids[i] < 0 || a->ids[i] >= a->num_rows) return LLMC_BAD_INDEX;
  if (a->dtype == LLMC_FLOAT32)
    gather<llmc::F32>(*a);
  else if (a->dtype == LLMC_FLOAT16)
    gather<llmc::F16>(*a);
  else
    gather<llmc::BF16>(*a);
  return LLMC_OK;
}
