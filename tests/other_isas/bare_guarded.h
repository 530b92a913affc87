// Blocks of memory as sanitize/guarded.h has them, where no operating system gives pages that no one may touch: the bytes before and behind
// are looked at when a block ends.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "shared_checks.h"

namespace taut {

class GuardedBlock {
 public:
  GuardedBlock() = default;
  explicit GuardedBlock(size_t bytes, size_t alignment = 1) : bytes_(bytes) {
    base_ = new uint8_t[bytes + alignment + 2 * kGuard];
    uintptr_t start = reinterpret_cast<uintptr_t>(base_) + kGuard;
    start += (alignment - start % (2 * alignment) + 2 * alignment) % (2 * alignment);  // no more aligned than it must be
    data_ = reinterpret_cast<uint8_t*>(start);
    std::memset(data_ - kGuard, kMark, kGuard), std::memset(data_ + bytes, kMark, kGuard);
    std::memset(data_, 0xff, bytes);
  }
  GuardedBlock(const GuardedBlock&) = delete;
  GuardedBlock(GuardedBlock&& other) noexcept { *this = std::move(other); }
  GuardedBlock& operator=(const GuardedBlock&) = delete;
  GuardedBlock& operator=(GuardedBlock&& other) noexcept {
    std::swap(base_, other.base_), std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~GuardedBlock() {
    for (size_t i = 0; base_ && i < kGuard; i++)
      if (data_[i - kGuard] != kMark || data_[bytes_ + i] != kMark) stop("a kernel wrote past a block of memory");
    delete[] base_;
  }

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr uint8_t kMark = 0xa5;
  uint8_t *base_ = nullptr, *data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace taut
