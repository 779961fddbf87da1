// One call of logprob_increase, and of the fused log-sum-exp behind it, as the instruction sets' kernels see them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../cpu/aligned.h"

namespace mllm {

// out[i] = log2 sum_v 2^(base[s][v] log2(e) + writes[i] . operand[v] + shift[i] * lean[s][v]),  s the source of row i's
// group.
// With cap > 0 the middle terms are a raw increase x, and count as capped(raw + x) - capped(raw).
struct Problem {
  const float* writes = nullptr;         // [rows, depth]
  const void* operand = nullptr;         // [vocab, depth], float32 or bfloat16
  bool operand_bfloat16 = false;
  int64_t group_rows = 0;                // rows of group g are g * group_rows and those after it
  const int64_t* source = nullptr;       // [groups], a row of base, lean and raw each; null: one after another
  const float* base = nullptr;           // [sources, vocab], log of the base probabilities
  const float* lean = nullptr;           // [sources, vocab] or null
  const float* shift = nullptr;          // [rows] or null
  const float* raw = nullptr;            // [sources, vocab] or null: raw logits in nats, for the cap
  float cap = 0;
  int64_t first = 0;                     // without a source: that of the first group
  int64_t rows = 0, vocab = 0, depth = 0, groups = 0;
  float* out = nullptr;                  // [rows]
  int threads = 1;
};

// out[i] = log p(token) after the write minus before, in nats; see logprob_increase/__init__.py. A write changes the
// logits by (scale + rescale) * (gain write . operand) + rescale * lean.
struct Increase {
  const float* writes = nullptr;         // [groups, rows, depth]
  std::vector<const void*> operands;     // one [vocab, depth] for all groups, or one for each
  bool operand_bfloat16 = false;
  const int64_t* source = nullptr;       // [groups]: the residual vector that is written to; null: one after another
  const int64_t* tokens = nullptr;       // [sources]; -1: no word
  const float* scale = nullptr;          // [sources]
  const float* rescale = nullptr;        // [groups, rows] or null
  const float* gain = nullptr;           // [depth] or null
  const float* log_probs = nullptr;      // [sources, vocab]
  const float* lean = nullptr;           // [sources, vocab], with rescale
  const float* raw = nullptr;            // [sources, vocab]: logits before the cap, with a cap
  float cap = 0;                         // 0: none
  int64_t sources = 0, groups = 0, rows = 0, vocab = 0, depth = 0;
  float* out = nullptr;                  // [groups, rows]
  int threads = 1;

  int64_t source_of(int64_t group) const { return source ? source[group] : group; }
};

// A panel: up to `width` rows of one group, side by side in the lanes.
struct Panel {
  int64_t row;
  int count, group;
};

inline std::vector<Panel> panels(const Problem& p, int width) {
  std::vector<Panel> list;
  for (int g = 0; g < p.groups; ++g)
    for (int64_t row = g * p.group_rows; row < (g + 1) * p.group_rows; row += width) {
      const int64_t left = (g + 1) * p.group_rows - row;
      list.push_back({row, static_cast<int>(left < width ? left : width), g});
    }
  return list;
}

// One thread's sums for every lane of every panel. `peak` and `sum` (relative to the peak, in powers of two) belong to
// the block of words at hand; `total`, relative to `level`, holds the blocks before it: thousands of float32 additions
// in a row would cost a decimal of precision.
struct Sums {
  Floats peak, sum;
  std::vector<double> total;
  Floats level;

  void start(size_t lanes) {
    peak.assign(lanes, 0.0f);
    sum.assign(lanes, 0.0f);
    total.assign(lanes, 0.0);
    level.assign(lanes, 0.0f);
  }

  // At the end of a block: moves `sum` into `total`. The peak stays, so what is left must look like a sum.
  void fold() {
    for (size_t i = 0; i < sum.size(); ++i) {
      if (!(sum[i] > NOTHING)) continue;
      if (peak[i] != level[i]) {
        if (total[i] > 0) total[i] *= std::exp2(static_cast<double>(level[i]) - peak[i]);
        level[i] = peak[i];
      }
      total[i] += sum[i];
      sum[i] = 2 * NOTHING;
    }
  }

  static constexpr float NOTHING = 1e-27f;  // a sum this small has no peak yet
};

// Joins the threads' sums into `out`.
inline void merge(const Problem& p, const std::vector<Panel>& list, int width, std::vector<Sums>& threads) {
  // the runtime may have granted fewer threads
  threads.erase(std::remove_if(threads.begin(), threads.end(), [](const Sums& t) { return t.total.empty(); }),
                threads.end());
  for (size_t i = 0; i < list.size(); ++i)
    for (int n = 0; n < list[i].count; ++n) {
      const size_t at = i * width + n;
      double top = -INFINITY, total = 0;
      for (const Sums& t : threads)
        if (t.total[at] > 0) top = std::max<double>(top, t.level[at]);
      for (const Sums& t : threads)
        if (t.total[at] > 0) total += t.total[at] * std::exp2(t.level[at] - top);
      p.out[list[i].row + n] = total > 0 ? static_cast<float>(top + std::log2(total)) : NAN;  // every word was NaN
    }
}

}  // namespace mllm
