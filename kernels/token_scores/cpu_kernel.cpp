// The increases of one explained token; see token_scores/__init__.py for the definition.
#include "cpu_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "../cpu/bfloat16.h"
#include "../cpu/isa.h"

#define MLLM_PATH "../token_scores/cpu_path.h"
#include "../cpu/each_isa.h"

namespace mllm {

TokenScorer token_scorer(const std::vector<int64_t>& sizes, float eps, const float* weight, const float* gain,
                         const std::vector<const float*>& outputs) {
  TokenScorer s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], eps, {}, {}};
  const int64_t padded = s.padded(), across = s.heads * s.width;
  s.words.assign(s.hidden * padded, 0.0f);
  for (int64_t e = 0; e < s.hidden; ++e)
    for (int64_t v = 0; v < s.vocab; ++v) s.words[e * padded + v] = weight[v * s.hidden + e] * gain[e];
  s.operators.assign(s.layers * across * padded, 0.0f);
  std::vector<double> sum(padded);
  for (int64_t i = 0; i < s.layers * across; ++i) {
    const float* column = outputs[i / across] + i % across;
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t e = 0; e < s.hidden; ++e) {
      const double factor = column[e * across];
      for (int64_t v = 0; v < padded; ++v) sum[v] += factor * s.words[e * padded + v];
    }
    for (int64_t v = 0; v < padded; ++v) s.operators[i * padded + v] = static_cast<float>(sum[v]);
  }
  return s;
}

void score_heads(const TokenScorer& s, const ScoredToken& p, const std::string& isa) {
#if defined(MLLM_X86)
  if (isa == "amx" || isa == "avx512_bf16" || isa == "avx512") return avx512::score_heads(s, p);
  if (isa == "avx2") return avx2::score_heads(s, p);
#endif
  if (isa == "plain") return plain::score_heads(s, p);
  throw std::invalid_argument("unknown instruction set " + isa);
}

void score_positions(const TokenScorer& s, const ScoredPositions& p, const std::string& isa) {
#if defined(MLLM_X86)
  if (isa == "amx" || isa == "avx512_bf16" || isa == "avx512") return avx512::score_positions(s, p);
  if (isa == "avx2") return avx2::score_positions(s, p);
#endif
  if (isa == "plain") return plain::score_positions(s, p);
  throw std::invalid_argument("unknown instruction set " + isa);
}

}  // namespace mllm
