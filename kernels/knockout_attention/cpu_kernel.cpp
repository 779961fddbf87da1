// Attention under a segment mask on the CPU; see knockout_attention/__init__.py for the definition.
#include "cpu_kernel.h"

#include <atomic>
#include <cstring>
#include <tuple>
#include <utility>

#include "../cpu/aligned.h"
#include "../cpu/huge_pages.h"
#include "../cpu/isa.h"
#include "../cpu/parallel.h"
#include "run_prefill.h"

#define MLLM_PATH "../knockout_attention/cpu_path.h"
#define MLLM_PAIR_PATH "../knockout_attention/cpu_pair_path.h"
#define MLLM_TILE_PATH "../knockout_attention/cpu_tile_path.h"
#include "../cpu/each_isa.h"

namespace mllm {

void attention(const AttentionProblem& problem, const std::string& isa) {
  AttentionProblem p = problem;
  std::vector<float> own_lse;
  if (p.mass && !p.lse) {  // the mass is made from it
    own_lse.resize(p.batch * p.heads * p.rows);
    p.lse = own_lse.data();
  }
  wish_huge_pages(p.out, p.batch * p.heads * p.rows * p.width * (p.bfloat16 ? 2 : 4));
#if defined(MLLM_AMX)
  if (isa == "amx" && amx_usable()) return amx::attention(p);
#endif
#if defined(MLLM_X86_BF16)
  if (isa == "avx512_bf16") return avx512_bf16::attention(p);
#endif
#if defined(MLLM_X86)
  if (isa == "avx512") return avx512::attention(p);
  if (isa == "avx2") return avx2::attention(p);
#endif
  if (isa == "plain") return plain::attention(p);
  throw std::invalid_argument("unknown instruction set " + isa);
}

}  // namespace mllm
