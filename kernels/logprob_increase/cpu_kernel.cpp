// log p(token) before and after writes; no logit of a write is stored.
#include "cpu_kernel.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "../cpu/aligned.h"
#include "../cpu/bfloat16.h"
#include "../cpu/isa.h"
#include "../cpu/parallel.h"

#define MLLM_PATH "../logprob_increase/cpu_path.h"
#define MLLM_TILE_PATH "../logprob_increase/cpu_tile_path.h"
#include "../cpu/each_isa.h"

namespace mllm {

void increase(const Increase& p, const std::string& isa) {
#if defined(MLLM_AMX)
  // for few rows, splitting the operand costs more than the tiles save
  if (isa == "amx" && amx_usable())
    return avx512::increase(p, [](const Problem& q) { q.rows > 32 ? amx::log_sum_exp(q) : avx512::log_sum_exp(q); });
#endif
#if defined(MLLM_X86)
  // its pairs of bfloat16 would have to be six products
  if (isa == "avx512" || isa == "avx512_bf16") return avx512::increase(p, avx512::log_sum_exp);
  if (isa == "avx2") return avx2::increase(p, avx2::log_sum_exp);
#endif
  if (isa == "plain") return plain::increase(p, plain::log_sum_exp);
  throw std::invalid_argument("unknown instruction set " + isa);
}

double fma_rate(int threads, const std::string& isa) {
#if defined(MLLM_AMX)
  if (isa == "amx" && amx_usable()) return amx::fma_rate(threads);
#endif
#if defined(MLLM_X86)
  if (isa == "avx512" || isa == "avx512_bf16") return avx512::fma_rate(threads);
  if (isa == "avx2") return avx2::fma_rate(threads);
#endif
  if (isa == "plain") return plain::fma_rate(threads);
  throw std::invalid_argument("unknown instruction set " + isa);
}

}  // namespace mllm
