// The op machinery: one constexpr table of impls per op, in priority order; the first that fits runs.
//
// A row says two things about a call, both pure functions of the op's Params:
//   supported  can this kernel compute it at all?   (ISA, dtype, format)   nullptr = yes, else why not
//   preferred  is it the one we want here?          (crossovers by shape)  nullptr = yes, else what is better
// Forcing an impl skips `preferred`, never `supported`. An impl's name is `<isa>` or `<isa>.<variant>`
// (cpu_avx2.int8_tile); forcing `cpu_avx2` admits every variant of it.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "common/cpu_features.h"

#define TAUT_EXPORT __attribute__((visibility("default")))  // what module.cpp calls in libtaut_cpu.so

namespace taut {

template <class Params>
struct Impl {
  const char* name;
  const char* (*supported)(const Params&);
  const char* (*preferred)(const Params&);
  void (*run)(const Params&);
  int64_t (*workspace_bytes)(const Params&) = nullptr;  // scratch that the op allocates for `run`; CUDA only
};

template <class Params>
const char* always(const Params&) {
  return nullptr;
}

// One row of what `explain` prints.
struct Verdict {
  std::string impl;
  std::string reason;  // empty: this one would run
  bool chosen = false;
};

// An op on one kind of device, as the outside world (module.cpp) sees it. `explain` takes the sizes by name, as integers.
struct OpInfo {
  const char* name;
  const char* device;  // "cpu", "cuda"; tests add the emulated ones
  std::vector<std::string> impls;
  std::vector<Verdict> (*explain)(const std::map<std::string, int64_t>&);
};
TAUT_EXPORT const std::vector<OpInfo>& ops();
TAUT_EXPORT void register_op(OpInfo info);  // called by static initialisers of the op files, of every library

template <class Params, size_t kRows>
bool register_table(const char* op, const char* device, const Impl<Params> (&table)[kRows], decltype(OpInfo::explain) explain) {
  OpInfo info{op, device, {}, explain};
  for (const auto& row : table) info.impls.push_back(row.name);
  register_op(std::move(info));
  return true;
}

// The forced impl of an op, or an empty string. Set by TAUT_FORCE_IMPL=<op>:<impl>[,<op>:<impl>] or force_impl.
TAUT_EXPORT std::string forced_impl(std::string_view op);
TAUT_EXPORT void force_impl(const std::string& op, const std::string& impl);  // empty impl: back to the table

// Whether a row's result must be the same whatever the other rows of the call are. CPU kernels always do it; on CUDA it
// rules out the kernels and the splits of K that depend on M.
TAUT_EXPORT bool batch_invariant();
TAUT_EXPORT void set_batch_invariant(bool on);

inline bool force_matches(std::string_view forced, std::string_view name) {
  return name == forced || (name.starts_with(forced) && name.size() > forced.size() && name[forced.size()] == '.');
}

// WHY throws: op.cpp turns it into the error torch raises; a forced impl that cannot run must never fall back in silence.
template <class Params, size_t kRows>
std::vector<Verdict> explain_table(const char* op, const Impl<Params> (&table)[kRows], const Params& params) {
  const std::string forced = forced_impl(op);
  std::vector<Verdict> verdicts;
  bool taken = false;
  for (const auto& row : table) {
    Verdict verdict{row.name, "", false};
    const bool is_forced = !forced.empty() && force_matches(forced, row.name);
    if (!forced.empty() && !is_forced) verdict.reason = "another impl is forced: " + forced;
    else if (const char* why = row.supported(params)) verdict.reason = why;
    else if (const char* why = is_forced && forced == row.name ? nullptr : row.preferred(params)) verdict.reason = why;
    else if (taken) verdict.reason = "an earlier impl was chosen";
    else verdict.chosen = taken = true;
    verdicts.push_back(verdict);
  }
  if (!taken && !forced.empty()) {  // forced by ISA, and no variant prefers this shape: the first that can run it
    for (size_t i = 0; i < kRows; i++)
      if (force_matches(forced, table[i].name) && !table[i].supported(params)) {
        verdicts[i].chosen = true, verdicts[i].reason.clear();
        break;
      }
  }
  return verdicts;
}

template <class Params, size_t kRows>
const Impl<Params>& select(const char* op, const Impl<Params> (&table)[kRows], const Params& params) {
  const std::string forced = forced_impl(op);
  if (forced.empty()) {
    for (const auto& row : table)
      if (!row.supported(params) && !row.preferred(params)) return row;
    throw std::runtime_error(std::string(op) + ": no impl can run this call; see taut.explain");
  }
  std::string why;
  const auto verdicts = explain_table(op, table, params);
  for (size_t i = 0; i < kRows; i++) {
    if (verdicts[i].chosen) return table[i];
    if (force_matches(forced, table[i].name)) why += std::string(" ") + table[i].name + ": " + verdicts[i].reason + ".";
  }
  throw std::runtime_error(std::string(op) + ": the forced impl " + forced + " cannot run this call." + why);
}

}  // namespace taut
