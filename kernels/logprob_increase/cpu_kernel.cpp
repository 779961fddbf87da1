// log2 sum_v 2^x with x = base + writes . operand^T, never stored: the work behind logprob_increase.
//
// The same text is compiled once an instruction set (not with -march: the module must load anywhere) and
// chosen at run time.
#include "cpu_kernel.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "../cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace plain {
constexpr int ROWS = 4, VECS = 2;
#define LANES 4
#include "../cpu/vector.h"
#include "cpu_tile.h"
#include "cpu_fma.h"
#include "cpu_spin.h"
#undef LANES
}  // namespace plain

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int ROWS = 4, VECS = 3;
#define LANES 8
#include "../cpu/vector.h"
#include "cpu_tile.h"
#include "cpu_fma.h"
#include "cpu_spin.h"
#undef LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
namespace avx512 {
constexpr int ROWS = 8, VECS = 3;
#define LANES 16
#include "../cpu/vector.h"
#include "cpu_tile.h"
#include "cpu_fma.h"
#include "cpu_spin.h"
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace mllm {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> list;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    list.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back("avx2");
#endif
  list.push_back("plain");
  return list;
}

void log_sum_exp(const Problem& p, const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512") return avx512::log_sum_exp(p);
  if (isa == "avx2") return avx2::log_sum_exp(p);
#endif
  if (isa == "plain") return plain::log_sum_exp(p);
  throw std::invalid_argument("unknown instruction set " + isa);
}

double fma_rate(int threads, const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512") return avx512::fma_rate(threads);
  if (isa == "avx2") return avx2::fma_rate(threads);
#endif
  if (isa == "plain") return plain::fma_rate(threads);
  throw std::invalid_argument("unknown instruction set " + isa);
}

}  // namespace mllm
