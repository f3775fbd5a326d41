// llmc::paged_attention on a CPU: check the call, write K and V, share the work out, attend.
//
// How the work is cut (paged_attention_plan.h) leaves no trace in the result: joining segments is the same arithmetic in the same order
// either way.
#include "paged_attention.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own AVX-512 headers set it off (gcc.gnu.org/PR105593)
#endif

#include <omp.h>

#include <algorithm>
#include <new>
#include <type_traits>

#include "paged_attention_amx.h"
#include "paged_attention_check.h"
#include "paged_attention_plan.h"
#include "paged_attention_quantized.h"
#include "paged_attention_tile.h"

namespace llmc_pa {
namespace {

constexpr int64_t kSerialWrite = 32 * 1024;  // elements of K below which one thread writes the cache

// One thread's room, cut out of its part of Plan::scratch.
struct Scratch {
  float* q;              // [rows of an item, padded]
  RowState part, total;  // of one segment; of all so far
  float* expanded;       // of a quantised cache: one chunk's K and V
  Bf16* tile_q;          // for tiles: q, and a segment's V in their order; else null
  Bf16* tile_v;
};

// T: of q, k, v and the result. C: of the caches, T itself or eight bits.
template <class T, class C = T>
class Call {
  using Read = std::conditional_t<kQuantized<C>, float, T>;  // what attention reads
  static constexpr int kItemRows = kPairs<C> ? 128 : 64;     // for tiles V is put in order once per item: more rows share that

 public:
  Call(const Args& args, Plan& plan) : a_(args), plan_(plan) {
    n_.D = static_cast<int>(a_.head_dim);
    n_.padded = (n_.D + kGroup - 1) / kGroup * kGroup;
    n_.lanes = W == 16 && a_.block_size % 16 == 0 ? 16 : 8;
    n_.lanes_log2 = n_.lanes == 16 ? 4 : 3;
    n_.scale = a_.scale;
    n_.softcap = a_.softcap;
    group_ = static_cast<int>(a_.num_heads / a_.num_kv_heads);
    part_stride_ = n_.padded + 16;
    // q, one segment's sums, all segments' sums; then a maximum and a denominator per row for both
    scratch_stride_ = static_cast<int64_t>(kItemRows) * (3 * n_.padded + 4);
    // then, of a quantised cache, one chunk's K and V; a last V group of a row may be read past its end
    if (kQuantized<C>) scratch_stride_ += 2LL * kChunk * n_.D + kGroup;
#if LLMC_AMX
    if (kPairs<C>) tiles_ = tiles_fit(n_);
    if (tiles_) scratch_stride_ += (kItemRows + kSegment) * static_cast<int64_t>(n_.D) / 2;  // then q and V for them
#endif
    scratch_stride_ = (scratch_stride_ + 15) / 16 * 16;
  }

  void run() {
    const int threads = omp_in_parallel() ? 1 : a_.num_threads > 0 ? a_.num_threads : omp_get_max_threads();
    const int64_t work = make_plan(a_, threads, kItemRows, part_stride_, &plan_);
    const bool alone = threads == 1 || work < kSerialWork || plan_.items.size() < 2;
    plan_.scratch.reserve((alone ? 1 : threads) * scratch_stride_);
    zero_padding();
    const int64_t num_items = static_cast<int64_t>(plan_.items.size()), num_joins = static_cast<int64_t>(plan_.joins.size());
    if (alone) {
      write_tokens(0, a_.num_tokens);
      for (int64_t i = 0; i < num_items; ++i) run_item(plan_.items[i], plan_.scratch.data());
      for (int64_t i = 0; i < num_joins; ++i) run_join(plan_.joins[i], plan_.scratch.data());
      return;
    }
    const bool write_alone = a_.slot_mapping == nullptr || a_.num_tokens * a_.num_kv_heads * a_.head_dim < kSerialWrite;
    if (write_alone) write_tokens(0, a_.num_tokens);
#pragma omp parallel num_threads(threads)
    {
      float* scratch = plan_.scratch.data() + omp_get_thread_num() * scratch_stride_;
      if (!write_alone) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < a_.num_tokens; ++t) write_tokens(t, t + 1);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_items; ++i) run_item(plan_.items[i], scratch);
      if (num_joins > 0) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_joins; ++i) run_join(plan_.joins[i], scratch);
      }
    }
  }

 private:
  void zero_padding() {
    const int64_t used = a_.query_start_loc[a_.num_seqs];
    const int64_t row = a_.num_heads * a_.head_dim;
    if (used < a_.num_tokens) memset(static_cast<T*>(a_.out) + used * row, 0, static_cast<size_t>(a_.num_tokens - used) * row * sizeof(T));
  }

  void write_tokens(int64_t begin, int64_t end) {
    if (a_.slot_mapping == nullptr) return;  // written by who called
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = a_.slot_mapping[t];
      if (slot < 0) continue;
      const int64_t block = slot / a_.block_size, offset = slot % a_.block_size;
      for (int64_t h = 0; h < a_.num_kv_heads; ++h) {
        C* k_tile = static_cast<C*>(a_.k_cache) + block * a_.k_cache_block_stride + h * a_.k_cache_head_stride;
        C* v_tile = static_cast<C*>(a_.v_cache) + block * a_.v_cache_block_stride + h * a_.v_cache_head_stride;
        const T* k = static_cast<const T*>(a_.k) + t * a_.k_token_stride + h * a_.k_head_stride;
        const T* v = static_cast<const T*>(a_.v) + t * a_.v_token_stride + h * a_.v_head_stride;
        if constexpr (kQuantized<C>) {
          float wide[kMaxHeadDim];
          widen(k, n_.D, wide);
          write_quantized(k_tile, true, static_cast<int>(offset), wide, n_.D, n_.lanes, a_.block_size);
          widen(v, n_.D, wide);
          write_quantized(v_tile, false, static_cast<int>(offset), wide, n_.D, n_.lanes, a_.block_size);
        } else {
          write_k(k_tile, static_cast<int>(offset), k, n_.D, n_.lanes);
          memcpy(v_tile + offset * n_.D, v, n_.D * sizeof(T));
        }
      }
    }
  }

  // Find the sub-tiles that hold keys [from, to) of the chunk at `chunk`; of a quantised cache, make them into fp32 in `expanded`.
  template <class Pointers>
  void locate(const Item& item, int chunk, int from, int to, float* expanded, Pointers* at) const {
    const int32_t* table = a_.block_tables + item.seq * a_.block_table_stride;
    const int64_t k_head = item.kv_head * a_.k_cache_head_stride, v_head = item.kv_head * a_.v_cache_head_stride;
    const auto size = static_cast<uint32_t>(a_.block_size);
    for (int i = from >> n_.lanes_log2; i << n_.lanes_log2 < to; ++i) {
      const auto key = static_cast<uint32_t>(chunk + (i << n_.lanes_log2));
      const int64_t block = table[key / size];
      const C* k_tile = static_cast<const C*>(a_.k_cache) + block * a_.k_cache_block_stride + k_head;
      const C* v_tile = static_cast<const C*>(a_.v_cache) + block * a_.v_cache_block_stride + v_head;
      if constexpr (kQuantized<C>) {
        float* k = expanded + static_cast<int64_t>(i << n_.lanes_log2) * n_.D;
        float* v = k + static_cast<int64_t>(kChunk) * n_.D;
        expand_k(k_tile, a_.block_size, n_.D, static_cast<int>(key % size), n_.lanes, k);
        expand_v(v_tile, a_.block_size, n_.D, static_cast<int>(key % size), n_.lanes, v);
        at->k[i] = k;
        at->v[i] = v;
      } else {
        const int64_t inside = static_cast<int64_t>(key % size) * n_.D;
        at->k[i] = k_tile + inside;
        at->v[i] = v_tile + inside;
      }
      if constexpr (std::is_same_v<Pointers, ChunkPointers<Read>>) at->next_k[i] = at->v[i];  // nothing to fetch, unless there is a chunk after
    }
  }

  void attend(int rows, const ChunkPointers<Read>& at, const float* q, const int* lo, const int* hi, RowState state) const {
    switch (rows) {
      case 1: return attend_tile<Read, 1>(n_, at, q, lo, hi, state);
      case 2: return attend_tile<Read, 2>(n_, at, q, lo, hi, state);
      case 3: return attend_tile<Read, 3>(n_, at, q, lo, hi, state);
      case 4: return attend_tile<Read, 4>(n_, at, q, lo, hi, state);
#if LLMC_PA_AVX512
      case 5: return attend_tile<Read, 5>(n_, at, q, lo, hi, state);
      case 6: return attend_tile<Read, 6>(n_, at, q, lo, hi, state);
      case 7: return attend_tile<Read, 7>(n_, at, q, lo, hi, state);
      case 8: return attend_tile<Read, 8>(n_, at, q, lo, hi, state);
#endif
    }
  }

#if LLMC_AMX
  // run_segment in the order of pairs.
  void run_segment_in_pairs(const Item& item, int segment, const Visible* see, const Scratch& at_hand, RowState state) const {
    const int rows = item.row1 - item.row0, begin = segment * kSegment;
    int lo[kItemRows], hi[kItemRows];
    for (int r = 0; r < rows; ++r) {
      lo[r] = std::max(0, see[r].lo - begin);
      hi[r] = std::min(kSegment, see[r].hi - begin);
    }
    SegmentPointers at;
    locate(item, begin, lo[0], hi[rows - 1], nullptr, &at);
    if (by_tiles(rows)) {
      if (attend_tiles(n_, at, at_hand.tile_q, at_hand.tile_v, rows, lo, hi, state)) return;
      for (int r = 0; r < rows; ++r) widen(at_hand.tile_q + static_cast<int64_t>(r) * n_.D, n_.D, at_hand.q + static_cast<int64_t>(r) * n_.padded);
    }
    memset(state.sums, 0, static_cast<size_t>(rows) * n_.padded * sizeof(float));
    attend_vectors(n_, at, at_hand.q, rows, lo, hi, state);
  }
#endif

  // All of an item's rows over one segment, from nothing into `state`.
  void run_segment(const Item& item, int segment, const Visible* see, const Scratch& at_hand, RowState state) const {
    const int rows = item.row1 - item.row0;
    for (int r = 0; r < rows; ++r) {
      state.max[r] = -kInf;
      state.denominator[r] = 0.0f;
    }
#if LLMC_AMX
    if constexpr (kPairs<C>) return run_segment_in_pairs(item, segment, see, at_hand, state);
#endif
    const float* q = at_hand.q;
    float* expanded = at_hand.expanded;
    memset(state.sums, 0, static_cast<size_t>(rows) * n_.padded * sizeof(float));
    // Rows are in order of position, so the first sees furthest back and the last furthest on.
    const int begin = std::max(segment * kSegment, see[0].lo / kChunk * kChunk), end = std::min((segment + 1) * kSegment, see[rows - 1].hi);
    int lo[kItemRows], hi[kItemRows];
    ChunkPointers<Read> at, next;
    const int first = std::max(0, see[0].lo - begin);
    if (begin < end && !kQuantized<C>) locate(item, begin, first, std::min(kChunk, see[rows - 1].hi - begin), expanded, &next);
    for (int chunk = begin; chunk < end; chunk += kChunk) {
      for (int r = 0; r < rows; ++r) {
        lo[r] = std::max(0, see[r].lo - chunk);
        hi[r] = std::min(kChunk, see[r].hi - chunk);
      }
      if constexpr (kQuantized<C>) {
        locate(item, chunk, chunk == begin ? first : 0, std::min(kChunk, see[rows - 1].hi - chunk), expanded, &at);
      } else {
        at = next;
        const int after = std::min(kChunk, see[rows - 1].hi - chunk - kChunk);
        if (after > 0) {
          locate(item, chunk + kChunk, 0, after, expanded, &next);
          std::copy(next.k, next.k + ((after + n_.lanes - 1) >> n_.lanes_log2), at.next_k);
        }
      }
      for (int r = 0; r < rows; r += kMaxRows) {
        const int64_t shift = static_cast<int64_t>(r) * n_.padded;
        attend(std::min(kMaxRows, rows - r), at, q + shift, lo + r, hi + r, {state.max + r, state.denominator + r, state.sums + shift});
      }
    }
  }

  static void start_total(int rows, RowState total) {
    std::fill(total.max, total.max + rows, -kInf);
    std::fill(total.denominator, total.denominator + rows, 0.0f);
  }

  // Add one segment of one row to its total. A segment that the row does not see changes nothing; its first one is copied.
  void join_row(const Visible& see, int segment, float max, float denominator, const float* sums, float* total_max, float* total_denominator,
                float* total_sums) const {
    if (see.lo >= see.hi || see.lo >= (segment + 1) * kSegment || see.hi <= segment * kSegment) return;
    if (see.lo / kSegment == segment) {
      *total_max = max;
      *total_denominator = denominator;
      memcpy(total_sums, sums, n_.padded * sizeof(float));
      return;
    }
    merge_segment(n_, max, denominator, sums, total_max, total_denominator, total_sums);
  }

  void finish(const Item& item, int row, float max, float denominator, float* sums) const {
    const int64_t token = a_.query_start_loc[item.seq] + row / group_, head = static_cast<int64_t>(item.kv_head) * group_ + row % group_;
    float sink = 0.0f;
    if (a_.sinks != nullptr) {
      if (a_.sinks_dtype == LLMC_FLOAT32) sink = static_cast<const float*>(a_.sinks)[head];
      if (a_.sinks_dtype == LLMC_FLOAT16) sink = to_float(static_cast<const Fp16*>(a_.sinks)[head]);
      if (a_.sinks_dtype == LLMC_BFLOAT16) sink = to_float(static_cast<const Bf16*>(a_.sinks)[head]);
    }
    T* out = static_cast<T*>(a_.out) + (token * a_.num_heads + head) * a_.head_dim;
    finish_row<T, Read>(n_, a_.sinks != nullptr ? &sink : nullptr, max, denominator, sums, out);
  }

  // Whether an item of that many rows runs on tiles; the bits are the same.
  bool by_tiles(int rows) const { return tiles_ && rows >= kFewestTileRows; }

  Scratch cut(float* scratch) const {
    const int64_t rows = static_cast<int64_t>(kItemRows) * n_.padded;
    Scratch at_hand = {};
    at_hand.q = scratch;
    float* numbers = scratch + 3 * rows;
    at_hand.part = {numbers, numbers + kItemRows, scratch + rows};
    at_hand.total = {numbers + 2 * kItemRows, numbers + 3 * kItemRows, scratch + 2 * rows};
    at_hand.expanded = numbers + 4 * kItemRows;
    if (tiles_) {
      at_hand.tile_q = reinterpret_cast<Bf16*>(at_hand.expanded);
      at_hand.tile_v = at_hand.tile_q + static_cast<int64_t>(kItemRows) * n_.D;
    }
    return at_hand;
  }

  const T* q_row(const Item& item, int row) const {
    const int64_t token = a_.query_start_loc[item.seq] + row / group_, head = static_cast<int64_t>(item.kv_head) * group_ + row % group_;
    return static_cast<const T*>(a_.q) + token * a_.q_token_stride + head * a_.q_head_stride;
  }

  void load_q(const Item& item, const Scratch& at_hand) const {
    const int rows = item.row1 - item.row0;
    if constexpr (kPairs<C>) {
      if (by_tiles(rows)) {
        for (int r = 0; r < rows; ++r) memcpy(at_hand.tile_q + static_cast<int64_t>(r) * n_.D, q_row(item, item.row0 + r), n_.D * sizeof(T));
        const int whole = (rows + kTileRows - 1) / kTileRows * kTileRows;
        memset(at_hand.tile_q + static_cast<int64_t>(rows) * n_.D, 0, static_cast<size_t>(whole - rows) * n_.D * sizeof(T));
        return;
      }
    }
    for (int r = 0; r < rows; ++r) widen(q_row(item, item.row0 + r), n_.D, at_hand.q + static_cast<int64_t>(r) * n_.padded);
  }

  void run_item(const Item& item, float* scratch) const {
    const DenormalsAreZero mode(kPairs<C>);
    const int rows = item.row1 - item.row0;
    const Scratch at_hand = cut(scratch);
    const RowState &part = at_hand.part, &total = at_hand.total;
    Visible see[kItemRows] = {};
    for (int r = 0; r < rows; ++r) see[r] = row_visible(a_, item, item.row0 + r);
    load_q(item, at_hand);
    if (item.segment >= 0) {
      run_segment(item, item.segment, see, at_hand, part);
      for (int r = 0; r < rows; ++r) {
        float* to = plan_.parts.data() + (item.part + r) * part_stride_;
        to[0] = part.max[r];
        to[1] = part.denominator[r];
        memcpy(to + 16, part.sums + static_cast<int64_t>(r) * n_.padded, n_.padded * sizeof(float));
      }
      return;
    }
    int s = see[0].lo / kSegment;
    if (see[rows - 1].lo / kSegment == s) {  // the first segment of all rows is the total so far
      run_segment(item, s++, see, at_hand, total);
    } else {
      start_total(rows, total);
      memset(total.sums, 0, static_cast<size_t>(rows) * n_.padded * sizeof(float));
    }
    for (; s * kSegment < see[rows - 1].hi; ++s) {
      run_segment(item, s, see, at_hand, part);
      for (int r = 0; r < rows; ++r) {
        const int64_t shift = static_cast<int64_t>(r) * n_.padded;
        join_row(see[r], s, part.max[r], part.denominator[r], part.sums + shift, total.max + r, total.denominator + r, total.sums + shift);
      }
    }
    for (int r = 0; r < rows; ++r) finish(item, item.row0 + r, total.max[r], total.denominator[r], total.sums + static_cast<int64_t>(r) * n_.padded);
  }

  void run_join(const Join& join, float* scratch) const {
    const DenormalsAreZero mode(kPairs<C>);
    const Item item{join.seq, join.kv_head, join.row0, join.row1, -1, 0};
    const int rows = join.row1 - join.row0;
    for (int r = 0; r < rows; ++r) {
      float max = -kInf, denominator = 0.0f;
      memset(scratch, 0, n_.padded * sizeof(float));
      for (int s = join.segment0; s < join.segment1; ++s) {
        const float* from = plan_.parts.data() + (join.part + static_cast<int64_t>(s - join.segment0) * rows + r) * part_stride_;
        join_row(row_visible(a_, item, join.row0 + r), s, from[0], from[1], from + 16, &max, &denominator, scratch);
      }
      finish(item, join.row0 + r, max, denominator, scratch);
    }
  }

  const Args& a_;
  Plan& plan_;
  Numbers n_;
  int group_;
  bool tiles_ = false;
  int64_t part_stride_, scratch_stride_;
};

template <class T>
void run(const Args& args, Plan& plan) {
  switch (args.kv_dtype) {
    case LLMC_INT8: return Call<T, Int8>(args, plan).run();
    case LLMC_FP8_E4M3: return Call<T, Fp8>(args, plan).run();
    default: return Call<T>(args, plan).run();
  }
}

}  // namespace
}  // namespace llmc_pa

extern "C" int llmc_paged_attention(const llmc_paged_attention_args* args) {
  using namespace llmc_pa;
  if (args == nullptr) return LLMC_PA_BAD_POINTER;
  if (args->struct_size != sizeof(llmc_paged_attention_args)) return LLMC_PA_BAD_STRUCT_SIZE;
  if (const int status = check(*args); status != LLMC_PA_OK) return status;
  if (args->num_tokens == 0) return LLMC_PA_OK;
  static thread_local Plan plan;  // keeps its memory from call to call; every field is rewritten
  try {
    switch (args->dtype) {
      case LLMC_FLOAT32: run<float>(*args, plan); break;
      case LLMC_FLOAT16: run<Fp16>(*args, plan); break;
      default: run<Bf16>(*args, plan); break;
    }
  } catch (const std::bad_alloc&) {
    return LLMC_PA_NO_MEMORY;
  }
  return LLMC_PA_OK;
}

extern "C" const char* llmc_paged_attention_message(int status) {
  switch (status) {
    case LLMC_PA_OK: return "ok";
    case LLMC_PA_BAD_STRUCT_SIZE: return "paged_attention: the argument struct has another size; caller and kernels come from different versions";
    case LLMC_PA_BAD_DTYPE: return "paged_attention: q, k, v must share one of float32, float16, bfloat16; caches are of that type, int8 or fp8 e4m3";
    case LLMC_PA_BAD_SHAPE: return "paged_attention: head_dim and block_size must be multiples of 8 and heads a multiple of kv heads";
    case LLMC_PA_BAD_POINTER: return "paged_attention: a tensor that the sizes need is missing";
    case LLMC_PA_BAD_QUERY_START: return "paged_attention: query_start_loc must start at 0, not fall, and stay within the tokens";
    case LLMC_PA_BAD_SEQ_LEN: return "paged_attention: a sequence length is negative or longer than its block table row";
    case LLMC_PA_BAD_BLOCK: return "paged_attention: a block id that a query needs is outside the cache";
    case LLMC_PA_BAD_SLOT: return "paged_attention: a slot lies past the last block";
    case LLMC_PA_BAD_NUMBER: return "paged_attention: window and softcap must not be negative, scale and softcap must be finite";
    case LLMC_PA_NO_MEMORY: return "paged_attention: no memory for scratch";
  }
  return "paged_attention: unknown status";
}
