// What op_cuda.cpp files share: tensors on a CUDA device, their stream, and where the ops are registered. With TAUT_EMULATE
// the same files make a library for tests, whose "device" is the emulator and whose tensors lie in the host's memory.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <sstream>
#include <utility>
#include <vector>

#include "common/device.h"
#include "common/torch_bridge.h"

#if defined(TAUT_EMULATE)
#include "cuda_emulator.h"
#define TAUT_CUDA_DEVICE "emulated " TAUT_EMULATED_MODE
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define TAUT_CUDA_DEVICE "cuda"
#endif

namespace taut {

inline void check_cuda_tensor(const char* op, const char* what, const Tensor& t) {
#if defined(TAUT_EMULATE)
  check(t.is_cpu(), op, ": ", what, " must be on the emulated device, which is the CPU");
#else
  check(t.is_cuda(), op, ": ", what, " must be on a CUDA device");
#endif
}

inline void check_same_device(const char* op, const char* what, const Tensor& t, const char* other_name, const Tensor& other) {
  check_cuda_tensor(op, what, t);
  check(t.get_device_index() == other.get_device_index(), op, ": ", what, " is on device ", t.get_device_index(), ", but ", other_name, " is on device ",
        other.get_device_index());
}

// The tensors of a call besides `first`; nullptr where one was not given.
inline void check_one_device(const char* op, const char* first_name, const Tensor& first, std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  check_cuda_tensor(op, first_name, first);
  for (const auto& [name, t] : others)
    if (t) check_same_device(op, name, *t, first_name, first);
}

// Temporary memory for kernels, which begins at `aligned`.
inline Tensor scratch_bytes(const Tensor& like, int64_t bytes) {
  const int64_t shape[] = {std::max<int64_t>(bytes, 0) + 256};
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape, 1), ScalarType::Byte);
}

// WHY: torch's CUDA allocator aligns to 512 bytes, the host's, in the emulator, to 64.
inline uint8_t* aligned(const Tensor& scratch) {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr()) + 255) & ~uintptr_t{255});
}

// The device of a call, made current for as long as this lives, and the stream torch would use there.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& t)
#if !defined(TAUT_EMULATE)
      : guard_(t.get_device_index()), index_(t.get_device_index())
#endif
  {
  }
#if defined(TAUT_EMULATE)
  ~CudaCall() { emulator::hide_all(); }
  CudaCall(const CudaCall&) = delete;
#endif

  const Device& device() const { return taut::device(index_); }

  void* stream() const {
    void* stream = nullptr;
#if !defined(TAUT_EMULATE)
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
#endif
    return stream;
  }

  // Tells the emulator which memory kernels of this call may touch; on a GPU nothing. What is writable counts as
  // uninitialised.
  void expose(const char* name, const void* data, int64_t bytes, bool writable) const {
#if defined(TAUT_EMULATE)
    emulator::expose(name, data, static_cast<size_t>(bytes), writable);
#else
    (void)name, (void)data, (void)bytes, (void)writable;
#endif
  }
  // All of a tensor that a kernel of this call changes in places, and reads.
  void expose_update(const char* name, const Tensor& t) const {
#if defined(TAUT_EMULATE)
    if (t.numel() != 0) emulator::expose(name, t.const_data_ptr(), static_cast<size_t>(span_bytes(t)), true, true);
#else
    (void)name, (void)t;
#endif
  }
  // All bytes from a tensor's first to its last element, whatever its strides.
  void expose(const char* name, const Tensor& t, bool writable = false) const {
    if (t.numel() != 0) expose(name, t.const_data_ptr(), span_bytes(t), writable);
  }

 private:
  static int64_t span_bytes(const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); d++) last += (t.size(d) - 1) * t.stride(d);
    return (last + 1) * static_cast<int64_t>(t.element_size());
  }
#if !defined(TAUT_EMULATE)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  int32_t index_ = 0;
};

// x @ w^T + bias [N] by torch, for w [N, K] whose rows [begin, end) `write(to, begin, end)` makes in x's dtype: as many at a time as fit in
// 512 MB.
template <class Write>
Tensor product_in_parts(const CudaCall& call, const Tensor& x, const std::optional<Tensor>& bias, int64_t N, int64_t K, const Write& write) {
  const auto linear = [](const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w), torch::stable::detail::from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  };
#if defined(TAUT_EMULATE)
  constexpr int64_t kMostBytes = 16 << 10;  // so that tests take more than one part
#else
  constexpr int64_t kMostBytes = int64_t{512} << 20;
#endif
  const int64_t rows = std::clamp<int64_t>(kMostBytes / (K * static_cast<int64_t>(x.element_size())), 1, N);
  std::optional<Tensor> out;
  for (int64_t begin = 0; begin < N; begin += rows) {
    const int64_t end = std::min(N, begin + rows), shape[] = {end - begin, K};
    const Tensor w = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape, 2));
    call.expose("w", w, true);
    write(w.mutable_data_ptr(), begin, end);
    if (rows == N) return linear(x, w, bias);
    const Tensor part = linear(x, w, bias ? std::optional<Tensor>(torch::stable::narrow(const_cast<Tensor&>(*bias), 0, begin, end - begin)) : std::nullopt);
    if (!out) {
      std::vector<int64_t> out_shape(x.sizes().begin(), x.sizes().end());
      out_shape.back() = N;
      out = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(out_shape.data(), out_shape.size()));
    }
    Tensor place = torch::stable::narrow(*out, out->dim() - 1, begin, end - begin);
    torch::stable::copy_(place, part);
  }
  return *out;
}

}  // namespace taut

// Where an op_cuda.cpp registers its ops: for the CUDA key of `taut`, whose schemas the CPU library defines; emulated, in a
// library of its own for the CPU key, which must define them too.
#if defined(TAUT_EMULATE)
#define TAUT_CUDA_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(TAUT_EMULATED_LIBRARY, m)
#define TAUT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(TAUT_EMULATED_LIBRARY, CPU, m)
#else
#define TAUT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(taut, CUDA, m)
#endif
