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

// clang has no `#pragma GCC target`; there the plain path serves
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MLLM_X86 1
#include <immintrin.h>
#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxtileintrin.h>)
#define MLLM_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
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

#if defined(MLLM_X86)
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

#if defined(MLLM_AMX)
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
namespace amx {
#define LANES 16
#include "../cpu/vector.h"
#include "cpu_tile.h"
#include "cpu_amx.h"
#undef LANES
}  // namespace amx
#pragma GCC pop_options
#endif

namespace mllm {

#if defined(MLLM_AMX)
// Whether the processor has the tiles and the kernel grants them: their state is large, and a process must ask.
static bool amx_usable() {
  static const bool usable = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  }();
  return usable;
}
#endif

std::vector<std::string> instruction_sets() {
  std::vector<std::string> list;
#if defined(MLLM_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
#if defined(MLLM_AMX)
    if (amx_usable()) list.push_back("amx");
#endif
    list.push_back("avx512");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back("avx2");
#endif
  list.push_back("plain");
  return list;
}

void log_sum_exp(const Problem& p, const std::string& isa) {
#if defined(MLLM_AMX)
  // for few rows, splitting the operand costs more than the tiles save
  if (isa == "amx" && amx_usable()) return p.rows > 32 ? amx::log_sum_exp(p) : avx512::log_sum_exp(p);
#endif
#if defined(MLLM_X86)
  if (isa == "avx512") return avx512::log_sum_exp(p);
  if (isa == "avx2") return avx2::log_sum_exp(p);
#endif
  if (isa == "plain") return plain::log_sum_exp(p);
  throw std::invalid_argument("unknown instruction set " + isa);
}

double fma_rate(int threads, const std::string& isa) {
#if defined(MLLM_AMX)
  if (isa == "amx" && amx_usable()) return amx::fma_rate(threads);
#endif
#if defined(MLLM_X86)
  if (isa == "avx512") return avx512::fma_rate(threads);
  if (isa == "avx2") return avx2::fma_rate(threads);
#endif
  if (isa == "plain") return plain::fma_rate(threads);
  throw std::invalid_argument("unknown instruction set " + isa);
}

}  // namespace mllm
