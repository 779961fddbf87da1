// A linear layer of a few rows; see few_row_linear/__init__.py for the definition.
#include "cpu_kernel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "../cpu/aligned.h"
#include "../cpu/bfloat16.h"
#include "../cpu/isa.h"
#include "../cpu/parallel.h"

#define MLLM_PATH "../few_row_linear/cpu_path.h"
#include "../cpu/each_isa.h"

namespace mllm {

void few_row_linear(const FewRowLinear& p, const std::string& isa) {
#if defined(MLLM_X86)
  // reading bounds it, not multiplying: neither tiles nor pairs
  if (isa == "amx" || isa == "avx512_bf16" || isa == "avx512") return avx512::few_row_linear(p);
  if (isa == "avx2") return avx2::few_row_linear(p);
#endif
  if (isa == "plain") return plain::few_row_linear(p);
  throw std::invalid_argument("unknown instruction set " + isa);
}

}  // namespace mllm
