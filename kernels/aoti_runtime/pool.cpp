#include "pool.h"

#include <cstdlib>
#include <mutex>

namespace llmc {
namespace {

struct Free {
  Free* next;
};

std::mutex lock;
Free* free_blocks[kNumClasses] = {};
PoolCounts counts = {};

// Class sizes: 64 * 2^e * {4, 5, 6, 7} / 4, in whole cache lines from 64 bytes on.
int64_t class_bytes(int32_t c) {
  const int64_t bytes = ((kAlign << (c / 4)) / 4) * (4 + c % 4);
  return (bytes + kAlign - 1) / kAlign * kAlign;
}

int32_t class_of(int64_t bytes) {
  int32_t c = 0;
  if (bytes > kAlign) c = 4 * (63 - __builtin_clzll(static_cast<uint64_t>(bytes) / kAlign));
  while (class_bytes(c) < bytes) c++;
  return c;
}

}  // namespace

void* take_block(int64_t bytes, int32_t* size_class) {
  const int32_t c = class_of(bytes);
  *size_class = c;
  {
    const std::lock_guard<std::mutex> held(lock);
    if (Free* block = free_blocks[c]) {
      free_blocks[c] = block->next;
      counts.kept -= class_bytes(c);
      counts.live++;
      return block;
    }
  }
  void* block = std::aligned_alloc(kAlign, static_cast<size_t>(class_bytes(c)));
  if (block) {
    const std::lock_guard<std::mutex> held(lock);
    counts.taken++;
    counts.live++;
  }
  return block;
}

void give_block(void* block, int32_t size_class) {
  const int64_t bytes = class_bytes(size_class);
  {
    const std::lock_guard<std::mutex> held(lock);
    counts.live--;
    if (counts.kept + bytes <= kKeptBytes) {
      Free* entry = static_cast<Free*>(block);
      entry->next = free_blocks[size_class];
      free_blocks[size_class] = entry;
      counts.kept += bytes;
      return;
    }
  }
  std::free(block);
}

PoolCounts pool_counts() {
  const std::lock_guard<std::mutex> held(lock);
  return counts;
}

}  // namespace llmc
