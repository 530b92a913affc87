// The checks of attention's kernels (attention.cpp) and of sparse weights' (sparse.cpp), which two programs are made with: this folder's, and
// that of other_isas.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

namespace taut {

// ---- What a program gives them ----

extern int num_workers;                   // how many threads run_tasks has
[[noreturn]] void stop(const char* why);  // says why, and ends with a failure

// ---- What they do ----

// Every case that takes no more than so many multiply-adds, by every impl that this processor can run. Returns a table of what was checked;
// stops at the first failure, or if one of `required` ("op:impl", with commas) did not run.
std::string check_attention(int64_t most_products, const char* required);
std::string check_sparse(int64_t most_products, const char* required);

inline bool contains_word(const char* words, const char* word) {  // words with commas
  const size_t size = std::strlen(word);
  for (const char* at = words; *at; at++)
    if (std::strncmp(at, word, size) == 0 && (at == words || at[-1] == ',') && (at[size] == 0 || at[size] == ',')) return true;
  return false;
}

}  // namespace taut
