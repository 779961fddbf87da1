// What cpu/each_isa.h compiles for products of bfloat16 in pairs: those of prefill. All else is the vectors' work.
#include "../cpu/lanes.h"
#include "cpu_rows.h"
#include "cpu_pack.h"
#include "cpu_pairs.h"
#include "cpu_prefill.h"

static void attention(const mllm::AttentionProblem& p) {
  // pairs are so fast that few rows already are worth packing the keys
  if (!p.bfloat16 || (p.group() * p.rows <= avx512::MOST_ROWS && (p.rows == 1 || p.group() * p.rows <= 3))) return avx512::attention(p);
  prefill<Pairs>(p);
  if (p.mass) avx512::add_mass<uint16_t>(p);
}
