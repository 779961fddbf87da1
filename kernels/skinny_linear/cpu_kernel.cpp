// A linear layer of a few rows; see skinny_linear/__init__.py for the definition.
#include "cpu_kernel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "../cpu/aligned.h"
#include "../cpu/bfloat16.h"
#include "../cpu/isa.h"
#include "../cpu/parallel.h"

#define MLLM_PATH "../skinny_linear/cpu_path.h"
#include "../cpu/each_isa.h"

namespace mllm {

void skinny_linear(const SkinnyLinear& p, const std::string& isa) {
#if defined(MLLM_X86)
  // reading bounds it, not multiplying: neither tiles nor pairs
  if (isa == "amx" || isa == "avx512_bf16" || isa == "avx512") return avx512::skinny_linear(p);
  if (isa == "avx2") return avx2::skinny_linear(p);
#endif
  if (isa == "plain") return plain::skinny_linear(p);
  throw std::invalid_argument("unknown instruction set " + isa);
}

}  // namespace mllm
