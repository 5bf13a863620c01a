#include "cpu/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace rnnfast {
namespace {

constexpr std::size_t line = 64, most_kept = std::size_t{256} << 20;
constexpr std::ptrdiff_t most_blocks = 32;  // few, since take() looks at every block

struct Block {
  void* data;
  std::size_t room;
};

// Nobody waits for this lock, since another thread may have held it when this process forked. Where it
// is taken, the system's allocator serves the call.
std::mutex lock;

// The kept blocks, the oldest first.
std::vector<Block>& kept() {
  static auto* blocks = [] {  // never destroyed: tensors may outlive the module
    auto* empty = new std::vector<Block>;
    empty->reserve(most_blocks);
    return empty;
  }();
  return *blocks;
}

Block take(std::size_t bytes, std::size_t waste) {
  const std::unique_lock guard(lock, std::try_to_lock);
  if (!guard) return {};
  std::vector<Block>& blocks = kept();
  auto best = blocks.end();
  for (auto block = blocks.begin(); block != blocks.end(); ++block)
    if (block->room >= bytes && block->room / waste <= bytes &&
        (best == blocks.end() || block->room < best->room))
      best = block;
  if (best == blocks.end()) {  // frees small blocks first, so that they do not add to the peak
    std::erase_if(blocks, [&](const Block& block) {
      const bool small = block.room < bytes;
      if (small) std::free(block.data);
      return small;
    });
    return {};
  }
  const Block block = *best;
  blocks.erase(best);
  return block;
}

void give_back(Block block) {
  if (block.room <= most_kept) {
    const std::unique_lock guard(lock, std::try_to_lock);
    if (guard) {
      std::vector<Block>& blocks = kept();
      std::size_t total = block.room;
      for (const Block& other : blocks) total += other.room;
      auto oldest = blocks.begin();
      for (; total > most_kept || blocks.end() - oldest >= most_blocks; ++oldest) {
        total -= oldest->room;
        std::free(oldest->data);
      }
      blocks.erase(blocks.begin(), oldest);
      blocks.push_back(block);
      return;
    }
  }
  std::free(block.data);
}

}  // namespace

Memory::Memory(std::size_t bytes, std::size_t waste) : bytes_(bytes) {
  Block block = take(bytes, waste);
  if (!block.data) {
    if (bytes > SIZE_MAX - line) throw OutOfMemory(bytes);
    block.room = (bytes / line + 1) * line;
    // Tried: huge pages (madvise) change nothing.
    block.data = std::aligned_alloc(line, block.room);
    if (!block.data) {
      release_memory();
      block.data = std::aligned_alloc(line, block.room);
    }
    if (!block.data) throw OutOfMemory(bytes);
  }
  data_ = block.data;
  room_ = block.room;
}

Memory::~Memory() { give_back({data_, room_}); }

void release_memory() {
  const std::unique_lock guard(lock, std::try_to_lock);
  if (!guard) return;
  for (const Block& block : kept()) std::free(block.data);
  kept().clear();
}

}  // namespace rnnfast
