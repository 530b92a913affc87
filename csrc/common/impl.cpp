#include "common/impl.h"

#include <atomic>
#include <mutex>

namespace taut {
namespace {

std::vector<OpInfo>& mutable_ops() {
  static std::vector<OpInfo> registry;
  return registry;
}

struct Forced {
  std::mutex mutex;
  std::map<std::string, std::string, std::less<>> impl;  // op -> impl, as force_impl set it
  std::atomic<bool> any{false};                          // the hot path reads only this
};

Forced& forced() {
  static Forced state;
  return state;
}

void check_known(const std::string& op, const std::string& impl) {
  std::string known_ops, known;
  for (const auto& info : ops()) {
    if (known_ops.find(std::string(" ") + info.name + " ") == std::string::npos) known_ops += std::string(" ") + info.name + " ";
    if (info.name != op) continue;
    for (const auto& name : info.impls) {
      if (force_matches(impl, name)) return;
      known += " " + name;
    }
  }
  if (known.empty()) throw std::invalid_argument("no op '" + op + "'; known ops:" + known_ops);
  throw std::invalid_argument("op " + op + " has no impl '" + impl + "'; it has:" + known);
}

}  // namespace

const std::vector<OpInfo>& ops() { return mutable_ops(); }
void register_op(OpInfo info) { mutable_ops().push_back(std::move(info)); }

namespace {
std::atomic<bool> batch_invariant_on{false};
}
bool batch_invariant() { return batch_invariant_on.load(std::memory_order_relaxed); }
void set_batch_invariant(bool on) { batch_invariant_on.store(on, std::memory_order_relaxed); }

std::string forced_impl(std::string_view op) {
  Forced& state = forced();
  if (!state.any.load(std::memory_order_acquire)) return {};
  std::lock_guard lock(state.mutex);
  const auto found = state.impl.find(op);
  return found == state.impl.end() ? std::string() : found->second;
}

void force_impl(const std::string& op, const std::string& impl) {
  if (!impl.empty()) check_known(op, impl);
  Forced& state = forced();
  std::lock_guard lock(state.mutex);
  if (impl.empty()) state.impl.erase(op);
  else state.impl[op] = impl;
  state.any.store(!state.impl.empty(), std::memory_order_release);
}

}  // namespace taut
