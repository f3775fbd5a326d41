#include "lora_add.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "linear/cpu/lanes.h"
#include "linear/cpu/matmul.h"

namespace {

using namespace llmc;

constexpr int64_t kBlock = 32;    // neighbouring rows of one adapter that read its matrices together
constexpr int kTile = 4;          // rows whose sums are in registers at a time
constexpr int kRanks = 4;         // rows of A likewise
constexpr int64_t kColumns = 64;  // columns of B a thread takes at a time

// Rows [begin, begin + count) of one slot; a slot of -1 is copied. `first`: where the rows' x A^T stand among those of all such rows.
struct Block {
  int64_t begin, count, slot, first;
};

inline Lanes lanes_product(Lanes a, Lanes b, Lanes acc) {
#ifdef __AVX512F__
  return {_mm512_fmadd_ps(a.v, b.v, acc.v)};
#else
  return {_mm256_fmadd_ps(a.lo, b.lo, acc.lo), _mm256_fmadd_ps(a.hi, b.hi, acc.hi)};
#endif
}

// Sixteen running sums, one per depth modulo 16, then a tree: an order that depends on k alone.
float sum_of(Lanes sums) {
  float sixteen[16], eight[8], four[4];
  lanes_store(sixteen, sums);
  for (int i = 0; i < 8; i++) eight[i] = sixteen[i] + sixteen[i + 8];
  for (int i = 0; i < 4; i++) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// h[row][r] = x[row] . A[r] for R rows and Q rows of A.
template <class D, class P, int R, int Q>
void dots(const typename D::Element* x, int64_t x_stride, const typename P::Element* a, int64_t k, float* h, int64_t h_stride) {
  Lanes acc[R][Q];
  for (int i = 0; i < R; i++)
    for (int r = 0; r < Q; r++) acc[i][r] = lanes_zero();
  for (int64_t j = 0; j < k; j += 16) {
    const int64_t depth = k - j < 16 ? k - j : 16;
    Lanes wide[R];
    for (int i = 0; i < R; i++) wide[i] = load_columns<D>(x + i * x_stride + j, depth);
    for (int r = 0; r < Q; r++) {
      const Lanes weights = load_columns<P>(a + r * k + j, depth);
      for (int i = 0; i < R; i++) acc[i][r] = lanes_product(weights, wide[i], acc[i][r]);
    }
  }
  for (int i = 0; i < R; i++)
    for (int r = 0; r < Q; r++) h[i * h_stride + r] = sum_of(acc[i][r]);
}

// The same for any number of rows and up to kRanks rows of A; how they are tiled changes no sum.
template <class D, class P, int Q>
void all_dots(const typename D::Element* x, int64_t x_stride, int64_t rows, const typename P::Element* a, int64_t k, float* h,
              int64_t h_stride) {
  int64_t i = 0;
  for (; i + kTile <= rows; i += kTile) dots<D, P, kTile, Q>(x + i * x_stride, x_stride, a, k, h + i * h_stride, h_stride);
  for (; i < rows; i++) dots<D, P, 1, Q>(x + i * x_stride, x_stride, a, k, h + i * h_stride, h_stride);
}

// out = y + h B for R rows and up to 16 columns, ranks in order.
template <class D, class P, int R>
void columns_of(const typename D::Element* y, int64_t y_stride, const float* h, int64_t h_stride, const typename P::Element* b,
                int64_t b_stride, int64_t rank, int64_t columns, typename D::Element* out, int64_t out_stride) {
  Lanes acc[R];
  for (int i = 0; i < R; i++) acc[i] = lanes_zero();
  for (int64_t r = 0; r < rank; r++) {
    const Lanes weights = load_columns<P>(b + r * b_stride, columns);
    for (int i = 0; i < R; i++) acc[i] = lanes_fma(weights, h[i * h_stride + r], acc[i]);
  }
  for (int i = 0; i < R; i++)
    store_columns<D>(out + i * out_stride, lanes_add(load_columns<D>(y + i * y_stride, columns), acc[i]), columns);
}

template <class D, class P>
void add(const LlmcLoraAddArgs& a, const std::vector<Block>& blocks, float* h, int threads) {
  using E = typename D::Element;
  using W = typename P::Element;
  const int64_t width = a.num_parts * a.rank, slices = (a.rank + kRanks - 1) / kRanks;
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  std::vector<int64_t> chunks;  // (part, first column within the part, first column)
  for (int64_t part = 0, begin = 0; part < a.num_parts; begin += a.sizes[part++])
    for (int64_t j = 0; j < a.sizes[part]; j += kColumns) chunks.insert(chunks.end(), {part, j, begin + j});
  const int64_t num_chunks = static_cast<int64_t>(chunks.size()) / 3;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) collapse(2)
    for (int64_t which = 0; which < num_blocks; which++) {
      for (int64_t job = 0; job < a.num_parts * slices; job++) {
        const Block& block = blocks[which];
        const int64_t part = job / slices, r = job % slices * kRanks;
        if (block.slot < 0 || a.offsets[part] < 0) continue;
        const W* matrix = static_cast<const W*>(a.pool) + block.slot * a.slot_elements + a.offsets[part] + r * a.k;
        const E* x = static_cast<const E*>(a.x) + block.begin * a.x_stride;
        float* products = h + block.first * width + part * a.rank + r;
        if (a.rank - r >= kRanks) {
          all_dots<D, P, kRanks>(x, a.x_stride, block.count, matrix, a.k, products, width);
          continue;
        }
        for (int64_t q = r; q < a.rank; q++)
          all_dots<D, P, 1>(x, a.x_stride, block.count, matrix + (q - r) * a.k, a.k, products + (q - r), width);
      }
    }
#pragma omp for schedule(static) collapse(2)
    for (int64_t which = 0; which < num_blocks; which++) {
      for (int64_t job = 0; job < num_chunks; job++) {
        const Block& block = blocks[which];
        const int64_t part = chunks[3 * job], within = chunks[3 * job + 1], at = chunks[3 * job + 2];
        const int64_t size = a.sizes[part], end = std::min(size, within + kColumns);
        const E* y = static_cast<const E*>(a.y) + block.begin * a.y_stride + at;
        E* out = static_cast<E*>(a.out) + block.begin * a.n + at;
        if (block.slot < 0 || a.offsets[part] < 0) {
          for (int64_t i = 0; i < block.count; i++) memcpy(out + i * a.n, y + i * a.y_stride, (end - within) * sizeof(E));
          continue;
        }
        const W* matrix = static_cast<const W*>(a.pool) + block.slot * a.slot_elements + a.offsets[part] + a.rank * a.k;
        const float* products = h + block.first * width + part * a.rank;
        for (int64_t j = within; j < end; j += 16) {
          const int64_t columns = std::min<int64_t>(16, end - j);
          const E* from = y + (j - within);
          E* to = out + (j - within);
          int64_t i = 0;
          for (; i + kTile <= block.count; i += kTile)
            columns_of<D, P, kTile>(from + i * a.y_stride, a.y_stride, products + i * width, width, matrix + j, size, a.rank, columns,
                                    to + i * a.n, a.n);
          for (; i < block.count; i++)
            columns_of<D, P, 1>(from + i * a.y_stride, a.y_stride, products + i * width, width, matrix + j, size, a.rank, columns,
                                to + i * a.n, a.n);
        }
      }
    }
  }
}

template <class D>
int32_t with_pool(const LlmcLoraAddArgs& a, const std::vector<Block>& blocks, float* h, int threads) {
  switch (a.pool_dtype) {
    case LLMC_FLOAT32: add<D, F32>(a, blocks, h, threads); return LLMC_OK;
    case LLMC_FLOAT16: add<D, F16>(a, blocks, h, threads); return LLMC_OK;
    case LLMC_BFLOAT16: add<D, BF16>(a, blocks, h, threads); return LLMC_OK;
  }
  return LLMC_BAD_DTYPE;
}

int64_t bytes_of(int32_t dtype) { return dtype == LLMC_FLOAT32 ? 4 : dtype == LLMC_FLOAT16 || dtype == LLMC_BFLOAT16 ? 2 : 0; }

// Nobody has an adapter: most steps of a server that also serves the plain model.
void copy_rows(const LlmcLoraAddArgs& a, int64_t element_bytes, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < a.m; row++)
    memcpy(static_cast<char*>(a.out) + row * a.n * element_bytes, static_cast<const char*>(a.y) + row * a.y_stride * element_bytes,
           a.n * element_bytes);
}

}  // namespace

int32_t llmc_lora_add(const LlmcLoraAddArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcLoraAddArgs)) return LLMC_BAD_STRUCT;
  if (a->m < 0 || a->n < 1 || a->k < 1 || a->rank < 1 || a->num_slots < 0 || a->num_parts < 1 || a->num_threads < 0) return LLMC_BAD_SHAPE;
  if (a->m > 1 && (a->y_stride < a->n || a->x_stride < a->k)) return LLMC_BAD_SHAPE;
  int64_t columns = 0, adapted = 0;
  for (int64_t i = 0; i < a->num_parts; i++) {
    if (a->sizes[i] < 0 || a->offsets[i] < -1) return LLMC_BAD_SHAPE;
    if (a->offsets[i] >= 0 && a->offsets[i] + a->rank * (a->k + a->sizes[i]) > a->slot_elements) return LLMC_BAD_SHAPE;
    columns += a->sizes[i];
    adapted += a->offsets[i] >= 0 ? a->k + a->sizes[i] : 0;
  }
  if (columns != a->n) return LLMC_BAD_SHAPE;
  const int64_t element_bytes = bytes_of(a->dtype), pool_bytes = bytes_of(a->pool_dtype);
  if (!element_bytes || !pool_bytes) return LLMC_BAD_DTYPE;
  int64_t rows = 0;
  for (int64_t i = 0; i < a->m; i++) {
    if (a->slots[i] < -1 || a->slots[i] >= a->num_slots) return LLMC_BAD_INDEX;
    rows += a->slots[i] >= 0;
  }
  const int64_t copied = a->m * a->n * element_bytes;
  if (rows == 0) {
    copy_rows(*a, element_bytes, copied < 1 << 18 ? 1 : num_threads_for(a->num_threads, 2 * copied, 0));
    return LLMC_OK;
  }
  try {
    std::vector<Block> blocks;
    int64_t first = 0;
    for (int64_t i = 0; i < a->m; i++) {
      const int64_t slot = a->slots[i];
      if (!blocks.empty() && blocks.back().slot == slot && blocks.back().count < kBlock) {
        blocks.back().count++;
      } else {
        blocks.push_back({i, 1, slot, first});
      }
      first += slot >= 0;
    }
    int64_t read = 0;
    for (const Block& block : blocks) read += block.slot >= 0 ? a->rank * adapted * pool_bytes : 0;
    std::vector<float> h(static_cast<size_t>(rows * a->num_parts * a->rank));
    const int threads = num_threads_for(a->num_threads, read + copied, rows * a->rank * adapted);
    switch (a->dtype) {
      case LLMC_FLOAT32: return with_pool<F32>(*a, blocks, h.data(), threads);
      case LLMC_FLOAT16: return with_pool<F16>(*a, blocks, h.data(), threads);
      default: return with_pool<BF16>(*a, blocks, h.data(), threads);
    }
  } catch (const std::bad_alloc&) {
    return LLMC_NO_MEMORY;
  }
}
