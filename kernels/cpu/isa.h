// Which instruction sets this compiler can build and this processor can use.
#pragma once
#include <string>
#include <vector>

// clang has no `#pragma GCC target`; there the plain path serves
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MLLM_X86 1
#include <immintrin.h>
#if __GNUC__ >= 10
#define MLLM_X86_BF16 1
#endif
#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxtileintrin.h>)
#define MLLM_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#endif

namespace mllm {

#if defined(MLLM_AMX)
// Whether the processor has the tiles and the kernel grants them: their state is large, and a process must ask.
inline bool amx_usable() {
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

#if defined(MLLM_X86_BF16)
inline bool pairs_usable() { return __builtin_cpu_supports("avx512bf16"); }
#endif

// Instruction sets this processor can use, best first; "plain" is always among them. What has no path of its own for
// one takes that of the next.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> list;
#if defined(MLLM_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
#if defined(MLLM_AMX)
    if (amx_usable()) list.push_back("amx");
#endif
#if defined(MLLM_X86_BF16)
    if (pairs_usable()) list.push_back("avx512_bf16");
#endif
    list.push_back("avx512");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back("avx2");
#endif
  list.push_back("plain");
  return list;
}

}  // namespace mllm
