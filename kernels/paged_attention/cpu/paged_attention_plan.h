// How a call is cut into work for threads.
//
// An item is some query rows (token, head of the group) of one sequence and one kv head, over all their keys. Where that gives too few
// items for the threads (decode at a small batch), an item is cut further by key segment, and the parts are joined afterwards.
#pragma once
#include <cstdlib>
#include <new>
#include <vector>

#include "paged_attention_check.h"
#include "paged_attention_tile.h"

namespace llmc_pa {

constexpr int64_t kSerialWork = 256 * 1024;  // multiply-adds below which waking other threads costs more than it gives

struct Item {
  int32_t seq;
  int32_t kv_head;
  int32_t row0, row1;  // rows of the sequence's [query token, head of the group], flattened
  int32_t segment;     // the one segment of a split item; -1: all of them, and the item finishes its rows
  int64_t part;        // of a split item: its first row in the parts
};

// Rows whose segments were computed apart: rows x segments parts, joined in order of segments.
struct Join {
  int32_t seq, kv_head, row0, row1;
  int32_t segment0, segment1;
  int64_t part;
};

// Floats at a cache line's start; grows, never shrinks. What it held is lost when it grows.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  float* data() const { return data_; }
  void reserve(int64_t floats) {
    if (floats <= size_) return;
    std::free(data_);
    size_ = 0;
    data_ = static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = floats;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

struct Plan {
  std::vector<Item> items;
  std::vector<Join> joins;
  Buffer scratch;  // per thread
  Buffer parts;    // per row of a split item: maximum, denominator, padding, sums
};

static inline Visible row_visible(const Args& a, const Item& item, int row) {
  return visible(a.seq_lens[item.seq] - query_rows(a, item.seq) + static_cast<int>(row / (a.num_heads / a.num_kv_heads)), a.window);
}

// Cut items of more than one segment into those; `part_stride` floats are kept of each of their rows.
static inline void split_by_segment(const Args& a, int64_t part_stride, Plan* plan) {
  std::vector<Item> whole;
  whole.swap(plan->items);
  int64_t parts = 0;
  for (const Item& item : whole) {
    const Visible first = row_visible(a, item, item.row0), last = row_visible(a, item, item.row1 - 1);
    const int s0 = first.lo / kSegment, s1 = (last.hi + kSegment - 1) / kSegment;
    if (s1 - s0 < 2) {
      plan->items.push_back(item);
      continue;
    }
    const int rows = item.row1 - item.row0;
    plan->joins.push_back({item.seq, item.kv_head, item.row0, item.row1, s0, s1, parts});
    for (int s = s0; s < s1; ++s, parts += rows) plan->items.push_back({item.seq, item.kv_head, item.row0, item.row1, s, parts});
  }
  plan->parts.reserve(parts * part_stride);
}

// Fill items of at most `most_rows` rows, joins and parts; returns the number of multiply-adds.
static inline int64_t make_plan(const Args& a, int threads, int most_rows, int64_t part_stride, Plan* plan) {
  plan->items.clear();
  plan->joins.clear();
  const int group = static_cast<int>(a.num_heads / a.num_kv_heads);
  int64_t work = 0, rows_total = 0;
  for (int64_t b = 0; b < a.num_seqs; ++b) {
    const int64_t nq = query_rows(a, b), keys = a.seq_lens[b] - first_visible(a, b);
    rows_total += nq * group;
    work += nq * a.num_heads * std::max<int64_t>(0, keys) * 2 * a.head_dim;
  }
  int item_rows = most_rows;
  while (item_rows > kMaxRows && rows_total * a.num_kv_heads < static_cast<int64_t>(item_rows) * 4 * threads) item_rows /= 2;
  for (int64_t b = 0; b < a.num_seqs; ++b) {
    const int rows = query_rows(a, b) * group;
    if (rows == 0) continue;
    // Late rows see more keys: they go first, so that the last items to be taken are small.
    for (int row0 = (rows - 1) / item_rows * item_rows; row0 >= 0; row0 -= item_rows)
      for (int h = 0; h < a.num_kv_heads; ++h)
        plan->items.push_back({static_cast<int32_t>(b), h, row0, std::min(rows, row0 + item_rows), -1, 0});
  }
  if (threads > 1 && work >= kSerialWork && plan->items.size() < 2 * static_cast<size_t>(threads)) split_by_segment(a, part_stride, plan);
  return work;
}

}  // namespace llmc_pa
