// The values of a row's heads, weighed; see weighted_values/__init__.py for the definition.
#include "cpu_kernel.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "../cpu/aligned.h"
#include "../cpu/bfloat16.h"
#include "../cpu/isa.h"
#include "../cpu/parallel.h"

#define MLLM_PATH "../weighted_values/cpu_path.h"
#include "../cpu/each_isa.h"

namespace mllm {

void weighted_values(const WeightedValues& p, const std::string& isa) {
#if defined(MLLM_X86)
  // no product of matrices: neither tiles nor pairs
  if (isa == "amx" || isa == "avx512_bf16" || isa == "avx512") return avx512::weighted_values(p);
  if (isa == "avx2") return avx2::weighted_values(p);
#endif
  if (isa == "plain") return plain::weighted_values(p);
  throw std::invalid_argument("unknown instruction set " + isa);
}

}  // namespace mllm
