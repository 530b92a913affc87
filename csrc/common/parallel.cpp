#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <new>

namespace taut {
namespace {

// WHY capped: a thread keeps its scratch for life; past this a block is given back when a smaller one will do.
constexpr size_t kKeepBytes = size_t{64} << 20;

struct Scratch {
  uint8_t* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

void run_tasks(int64_t num_tasks, TaskBody body, void* context) {
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) body(context, task);
  });
}

uint8_t* scratch(int slot, size_t bytes) {
  thread_local Scratch slots[kScratchSlots];
  Scratch& block = slots[slot];
  if (bytes > block.size || (block.size > kKeepBytes && bytes <= kKeepBytes)) {
    std::free(block.data);
    block.data = nullptr;
    block.size = (bytes + 4095) / 4096 * 4096;
    block.data = static_cast<uint8_t*>(std::aligned_alloc(4096, block.size));
    if (!block.data) {
      block.size = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

}  // namespace taut
