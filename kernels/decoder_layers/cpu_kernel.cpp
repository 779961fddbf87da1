// The layers of a decoder over a few rows; see decoder_layers/__init__.py for the definition.
#include "cpu_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "../cpu/aligned.h"
#include "../cpu/bfloat16.h"
#include "../cpu/isa.h"
#include "../cpu/phases.h"
#include "room.h"

#define MLLM_PATH "../decoder_layers/cpu_path.h"
#define MLLM_PAIR_PATH "../decoder_layers/cpu_pair_path.h"
#include "../cpu/each_isa.h"

namespace mllm {

void decoder_layers(const DecoderSizes& sizes, const std::vector<DecoderLayer>& layers, const DecoderPass& p,
                    const std::string& isa) {
#if defined(MLLM_X86)
#if defined(MLLM_X86_BF16)
  const bool even = sizes.hidden % 32 == 0 && sizes.queries() % 32 == 0 && sizes.inner % 32 == 0;
  if (isa != "avx512" && isa != "avx2" && isa != "plain" && sizes.bfloat16 && even && pairs_usable())
    return avx512_bf16::decoder_layers(sizes, layers, p);
#endif
  if (isa == "amx" || isa == "avx512_bf16" || isa == "avx512") return avx512::decoder_layers(sizes, layers, p);
  if (isa == "avx2") return avx2::decoder_layers(sizes, layers, p);
#endif
  if (isa == "plain") return plain::decoder_layers(sizes, layers, p);
  throw std::invalid_argument("unknown instruction set " + isa);
}

}  // namespace mllm
