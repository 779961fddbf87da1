// What cpu/each_isa.h compiles for the matrix tiles: the products of prefill. All else is the vectors' work.
#include "../cpu/lanes.h"
#include "cpu_rows.h"
#include "cpu_amx.h"

static void attention(const mllm::AttentionProblem& p) {
  if (p.group() * p.rows <= avx512::MOST_ROWS) return avx512::attention(p);
  p.bfloat16 ? prefill<uint16_t>(p) : prefill<float>(p);
  if (p.mass) p.bfloat16 ? avx512::add_mass<uint16_t>(p) : avx512::add_mass<float>(p);
}
