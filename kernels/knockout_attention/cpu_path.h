// What cpu/each_isa.h compiles once an instruction set.
#include "../cpu/lanes.h"
#include "cpu_rows.h"
#include "cpu_pack.h"
#include "cpu_singles.h"
#include "cpu_prefill.h"
#include "cpu_mass.h"
#include "cpu_decode.h"

constexpr int64_t BLOCKS_FROM = 11;  // rows of a head from which a prefill's blocks of rows are the faster way

static void attention(const mllm::AttentionProblem& p) {
  if (p.group() * p.rows <= MOST_ROWS && p.rows < BLOCKS_FROM) return p.bfloat16 ? decode<uint16_t>(p) : decode<float>(p);
  p.bfloat16 ? prefill<Singles<uint16_t>>(p) : prefill<Singles<float>>(p);
  if (p.mass) p.bfloat16 ? add_mass<uint16_t>(p) : add_mass<float>(p);
}
