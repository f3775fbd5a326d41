#include "all_reduce.h"

#include <sched.h>
#include <string.h>
#include <time.h>

#include <atomic>

#include "linear/cpu/lanes.h"
#include "linear/cpu/matmul.h"

namespace {

using namespace llmc;

constexpr int64_t kMaxRanks = 16;
constexpr int64_t kSlotBytes = 1 << 20;  // a larger tensor goes in pieces
constexpr int64_t kLine = 64;

// One cache line per rank: how many pieces it has put into its slots. Lines first, then two slots per rank, used in turn: who publishes
// piece s + 1 has read all of piece s, so piece s + 2 may overwrite it once everybody's count is s + 1.
struct Line {
  std::atomic<uint64_t> published;
  std::atomic<uint32_t> aborted;
  char rest[kLine - sizeof(std::atomic<uint64_t>) - sizeof(std::atomic<uint32_t>)];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "counters are shared between processes");

struct Group {
  Line* lines = nullptr;
  char* slots = nullptr;
  int64_t rank = 0, ranks = 0;
  uint64_t piece = 0;
};
Group group;  // a process is a rank of one group, and its program runs in one thread at a time

char* slot(int64_t rank, uint64_t piece) { return group.slots + (2 * rank + static_cast<int64_t>(piece & 1)) * kSlotBytes; }

bool wait_for_all(uint64_t piece) {
  for (int64_t r = 0; r < group.ranks; r++) {
    for (int64_t tries = 0; group.lines[r].published.load(std::memory_order_acquire) < piece; tries++) {
      if (group.lines[0].aborted.load(std::memory_order_relaxed)) return false;
      if (tries < 2000) continue;
      if (tries < 4000) {
        sched_yield();  // ranks may be more than processors
      } else {
        const timespec pause = {0, 50000};
        nanosleep(&pause, nullptr);
      }
    }
  }
  return true;
}

template <class D>
int32_t reduce(const LlmcAllReduceArgs& a) {
  using E = typename D::Element;
  constexpr int64_t kMost = kSlotBytes / static_cast<int64_t>(sizeof(E));
  const E* x = static_cast<const E*>(a.x);
  E* y = static_cast<E*>(a.y);
  for (int64_t at = 0; at < a.n; at += kMost) {
    const int64_t count = a.n - at < kMost ? a.n - at : kMost;
    const uint64_t piece = ++group.piece;
    memcpy(slot(group.rank, piece), x + at, count * sizeof(E));
    group.lines[group.rank].published.store(piece, std::memory_order_release);
    if (!wait_for_all(piece)) return LLMC_PEER_LOST;
    for (int64_t j = 0; j < count; j += 16) {
      const int64_t columns = count - j < 16 ? count - j : 16;
      float sum[16] = {}, part[16];
      for (int64_t r = 0; r < group.ranks; r++) {
        lanes_store(part, load_columns<D>(reinterpret_cast<const E*>(slot(r, piece)) + j, columns));
        for (int i = 0; i < 16; i++) sum[i] += part[i];
      }
      store_columns<D>(y + at + j, lanes_load(sum), columns);
    }
  }
  return LLMC_OK;
}

}  // namespace

int64_t llmc_all_reduce_bytes(int64_t ranks) {
  return ranks < 1 || ranks > kMaxRanks ? 0 : ranks * (static_cast<int64_t>(sizeof(Line)) + 2 * kSlotBytes);
}

int32_t llmc_all_reduce_join(void* shared, int64_t bytes, int64_t rank, int64_t ranks) {
  if (!shared || bytes < 1 || bytes != llmc_all_reduce_bytes(ranks) || rank < 0 || rank >= ranks) return LLMC_BAD_SHAPE;
  group = Group{static_cast<Line*>(shared), static_cast<char*>(shared) + ranks * sizeof(Line), rank, ranks, 0};
  return LLMC_OK;
}

void llmc_all_reduce_abort(void* shared) { static_cast<Line*>(shared)[0].aborted.store(1, std::memory_order_relaxed); }

int32_t llmc_all_reduce(const LlmcAllReduceArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcAllReduceArgs)) return LLMC_BAD_STRUCT;
  if (a->n < 0 || !group.lines || a->ranks != group.ranks) return LLMC_BAD_SHAPE;
  switch (a->dtype) {
    case LLMC_FLOAT32: return reduce<F32>(*a);
    case LLMC_FLOAT16: return reduce<F16>(*a);
    case LLMC_BFLOAT16: return reduce<BF16>(*a);
  }
  return LLMC_BAD_DTYPE;
}
