#include "rms_norm.h"

#include <omp.h>

#include <cmath>

#include "linear/cpu/lanes.h"
#include "linear/cpu/matmul.h"

namespace {

using namespace llmc;

// A loop of fixed length over sixteen floats, which compilers turn into vector instructions at every level.
struct Sixteen {
  float v[16];
  explicit Sixteen(Lanes a) { lanes_store(v, a); }
  Lanes lanes() const { return lanes_load(v); }
};

// Sixteen running sums, one per column modulo 16, then a tree: the same order at every instruction set.
float sum_of(const float* parts) {
  float eight[8], four[4];
  for (int i = 0; i < 8; i++) eight[i] = parts[i] + parts[i + 8];
  for (int i = 0; i < 4; i++) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <class D, class W>
void norm_row(const LlmcRmsNormArgs& a, int64_t row) {
  using E = typename D::Element;
  const E* x = static_cast<const E*>(a.x) + row * a.x_stride;
  E* y = static_cast<E*>(a.y) + row * a.n;
  const auto* weight = static_cast<const typename W::Element*>(a.weight);
  const float offset = static_cast<float>(a.offset);
  if (a.residual) {
    const E* residual = static_cast<const E*>(a.residual) + row * a.residual_stride;
    E* sum = static_cast<E*>(a.sum) + row * a.n;
    for (int64_t j = 0; j < a.n; j += 16) {
      const int64_t columns = a.n - j < 16 ? a.n - j : 16;
      store_columns<D>(sum + j, lanes_add(load_columns<D>(x + j, columns), load_columns<D>(residual + j, columns)), columns);
    }
    x = sum;
  }
  float squares[16] = {};
  for (int64_t j = 0; j < a.n; j += 16) {
    const Sixteen wide(load_columns<D>(x + j, a.n - j < 16 ? a.n - j : 16));
    for (int i = 0; i < 16; i++) squares[i] += wide.v[i] * wide.v[i];
  }
  const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(a.n) + static_cast<float>(a.eps));
  for (int64_t j = 0; j < a.n; j += 16) {
    const int64_t columns = a.n - j < 16 ? a.n - j : 16;
    Sixteen out(load_columns<D>(x + j, columns));
    const Sixteen w(load_columns<W>(weight + j, columns));
    for (int i = 0; i < 16; i++) out.v[i] *= scale;
    if (a.round_first) {
      E rounded[16];
      D::store16(rounded, out.lanes());
      out = Sixteen(D::load16(rounded));
    }
    for (int i = 0; i < 16; i++) out.v[i] *= offset + w.v[i];
    store_columns<D>(y + j, out.lanes(), columns);
  }
}

template <class D, class W>
void norm_rows(const LlmcRmsNormArgs& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < a.m; row++) norm_row<D, W>(a, row);
}

template <class D>
int32_t with_weight(const LlmcRmsNormArgs& a, int threads) {
  switch (a.weight_dtype) {
    case LLMC_FLOAT32: norm_rows<D, F32>(a, threads); return LLMC_OK;
    case LLMC_FLOAT16: norm_rows<D, F16>(a, threads); return LLMC_OK;
    case LLMC_BFLOAT16: norm_rows<D, BF16>(a, threads); return LLMC_OK;
  }
  return LLMC_BAD_DTYPE;
}

}  // namespace

int32_t llmc_rms_norm(const LlmcRmsNormArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcRmsNormArgs)) return LLMC_BAD_STRUCT;
  if (a->m < 0 || a->n < 1 || a->num_threads < 0 || (a->residual == nullptr) != (a->sum == nullptr)) return LLMC_BAD_SHAPE;
  if (a->m > 1 && (a->x_stride < a->n || (a->residual && a->residual_stride < a->n))) return LLMC_BAD_SHAPE;
  // A row is a microsecond; waking threads for a few costs more than it saves.
  const int threads = a->m < 8 ? 1 : num_threads_for(a->num_threads, a->m * a->n * 8, a->m * a->n * 4);
  switch (a->dtype) {
    case LLMC_FLOAT32: return with_weight<F32>(*a, threads);
    case LLMC_FLOAT16: return with_weight<F16>(*a, threads);
    case LLMC_BFLOAT16: return with_weight<BF16>(*a, threads);
  }
  return LLMC_BAD_DTYPE;
}
