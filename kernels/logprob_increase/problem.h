// One call of the fused log-sum-exp, as the instruction sets' kernels see it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../cpu/aligned.h"

namespace mllm {

// out[i] = log2 sum_v 2^(base[g][v] + writes[i] . operand[v] + shift[i] * lean[g][v]),  g the group of row i.
// With cap > 0 the middle terms are a raw increase x, and count as capped(raw + x) - capped(raw).
struct Problem {
  const float* writes = nullptr;         // [rows, depth]
  const void* operand = nullptr;         // [vocab, depth], float32 or bfloat16
  bool operand_bfloat16 = false;
  const int64_t* group_start = nullptr;  // [groups + 1]: rows of group g are group_start[g] .. group_start[g + 1]
  const float* base = nullptr;           // [groups, vocab], log2 of the base probabilities
  const float* lean = nullptr;           // [groups, vocab] or null
  const float* shift = nullptr;          // [rows] or null
  const float* raw = nullptr;            // [groups, vocab] or null: raw logits in nats, for the cap
  float cap = 0;
  int64_t rows = 0, vocab = 0, depth = 0, groups = 0;
  float* out = nullptr;                  // [rows]
  int threads = 1;
};

// A panel: up to `width` rows of one group, side by side in the lanes.
struct Panel {
  int64_t row;
  int count, group;
};

inline std::vector<Panel> panels(const Problem& p, int width) {
  std::vector<Panel> list;
  for (int g = 0; g < p.groups; ++g)
    for (int64_t row = p.group_start[g]; row < p.group_start[g + 1]; row += width) {
      const int64_t left = p.group_start[g + 1] - row;
      list.push_back({row, static_cast<int>(left < width ? left : width), g});
    }
  return list;
}

// Joins the threads' running sums, in double, into `out`.
inline void merge(const Problem& p, const std::vector<Panel>& list, int width,
                  const std::vector<Floats>& peaks, const std::vector<Floats>& sums) {
  for (size_t i = 0; i < list.size(); ++i)
    for (int n = 0; n < list[i].count; ++n) {
      const size_t at = i * width + n;
      double top = -INFINITY, total = 0;
      for (size_t t = 0; t < peaks.size(); ++t)
        if (sums[t][at] > 0) top = std::max<double>(top, peaks[t][at]);
      for (size_t t = 0; t < peaks.size(); ++t)
        if (sums[t][at] > 0) total += sums[t][at] * std::exp2(peaks[t][at] - top);
      p.out[list[i].row + n] = static_cast<float>(top + std::log2(total));
    }
}

}  // namespace mllm
