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
  std::string known_ops;
  for (const auto& info : ops()) {
    known_ops += std::string(" ") + info.name;
    if (info.name != op) continue;
    std::string known;
    for (const auto& name : info.impls) {
      if (force_matches(impl, name)) return;
      known += " " + name;
    }
    throw std::invalid_argument("op " + op + " has no impl '" + impl + "'; it has:" + known);
  }
  throw std::invalid_argument("no op '" + op + "'; known ops:" + known_ops);
}

}  // namespace

const std::vector<OpInfo>& ops() { return mutable_ops(); }
void register_op(OpInfo info) { mutable_ops().push_back(std::move(info)); }

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
