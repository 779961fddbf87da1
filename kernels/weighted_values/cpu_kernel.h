#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace mllm {

// out[g][n] = alpha_n v_n for the heads of one row; see weighted_values/__init__.py.
struct WeightedValues {
  struct Head {
    const void *query, *keys, *values;  // the first of each
    int64_t key_stride, value_stride;   // from one position to the next
    const uint8_t* seen;                // [positions] or null
    float scale;
  };
  std::vector<Head> heads;
  bool bfloat16 = false;  // all operands; else float32
  int64_t positions = 0, width = 0;
  float* out = nullptr;  // [heads, positions, width]
  int threads = 1;
};

// Fills p.out; `isa` is one of instruction_sets() of cpu/isa.h.
void weighted_values(const WeightedValues& p, const std::string& isa);

}  // namespace mllm
