// Memory for tensors: 64-byte aligned blocks by size class, kept for the next step, so that a step like one before allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmc {

// Four classes to a power of two: a block is at most a quarter larger than asked for.
constexpr int kNumClasses = 4 * 40;
constexpr int64_t kAlign = 64;
constexpr int64_t kMaxBytes = int64_t{1} << 40;    // one block; above it a size is taken for a fault of the program
constexpr int64_t kKeptBytes = int64_t{256} << 20;  // free blocks kept at most; what a large prefill leaves beyond goes back

struct PoolCounts {
  int64_t taken;  // blocks ever asked of the system
  int64_t live;   // blocks in use
  int64_t kept;   // bytes of free blocks
};

// A block of at least `bytes` (1 to kMaxBytes), or null where the system has no memory. `size_class` is given back with it.
void* take_block(int64_t bytes, int32_t* size_class);
void give_block(void* block, int32_t size_class);
PoolCounts pool_counts();

}  // namespace llmc
