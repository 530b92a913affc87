// Memory that ends at a page no one may touch. Inline assembly escapes AddressSanitizer, which checks only the loads and
// stores that the compiler emits: past the end of a block, the processor itself stops it. What lies before a block, and in
// the gap that an alignment leaves behind it, is poisoned for AddressSanitizer.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace taut {

class GuardedBlock {
 public:
  GuardedBlock() = default;
  // `bytes` bytes, all ones (NaN in any dtype), that start at a multiple of `alignment` (a power of two), no more aligned
  // than they must be, and end as close to the guard page as that allows.
  explicit GuardedBlock(size_t bytes, size_t alignment = 1) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (bytes + alignment + page - 1) / page * page;
    mapped_ = usable + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + usable, page, PROT_NONE) != 0) std::abort();
    const size_t start = (usable - bytes) / alignment * alignment;
    data_ = base_ + start;
    std::memset(data_, 0xff, bytes);
    ASAN_POISON_MEMORY_REGION(base_, start);
    ASAN_POISON_MEMORY_REGION(data_ + bytes, usable - start - bytes);
  }
  GuardedBlock(const GuardedBlock&) = delete;
  GuardedBlock(GuardedBlock&& other) noexcept { *this = std::move(other); }
  GuardedBlock& operator=(const GuardedBlock&) = delete;
  GuardedBlock& operator=(GuardedBlock&& other) noexcept {
    std::swap(base_, other.base_), std::swap(data_, other.data_), std::swap(bytes_, other.bytes_), std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~GuardedBlock() {
    if (base_ == nullptr) return;
    ASAN_UNPOISON_MEMORY_REGION(base_, mapped_);
    munmap(base_, mapped_);
  }

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t *base_ = nullptr, *data_ = nullptr;
  size_t bytes_ = 0, mapped_ = 0;
};

}  // namespace taut
