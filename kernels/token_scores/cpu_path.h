// What cpu/each_isa.h compiles once an instruction set. Words lie in lanes: the change of their logits by some writes is
// a sum of rows of the operator, and stays in the first cache for the log-sum-exp.
#include "../cpu/lanes.h"

constexpr int WRITES = LANES == 16 ? 6 : 2;  // rows of sums, by up to four vectors of words
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float LEAST = -1000.0f;  // log2 of a probability that is none

// out [R][padded] = factor * x [R][depth] . rows [depth][padded], for N vectors of words
template <int R, int N>
static inline void some_words(const float* x, const float* rows, int64_t depth, int64_t padded, float factor,
                              float* out) {
  vec sum[R][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vec row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(rows + k * padded + n * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float one = x[r * depth + k];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] += row[n] * one;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(out + r * padded + n * LANES, sum[r][n] * factor);
}

template <int R>
static void all_words(const float* x, const float* rows, int64_t depth, int64_t padded, float factor, float* out) {
  int64_t v = 0;
  for (; v + 4 * LANES <= padded; v += 4 * LANES) some_words<R, 4>(x, rows + v, depth, padded, factor, out + v);
  for (; v < padded; v += LANES) some_words<R, 1>(x, rows + v, depth, padded, factor, out + v);
}

// Kept by the thread: a stream calls this twice a token.
static float* changes(int64_t count) {
  static thread_local mllm::Floats held;
  if (static_cast<int64_t>(held.size()) < count) held.resize(count);
  return held.data();
}

static float norm_of(const mllm::TokenScorer& s, const float* final) {
  return 1 / std::sqrt(dot(final, final, s.hidden) / s.hidden + s.eps);
}

// log2 sum_v 2^(change_v + before_v)
static float log_sum(const float* change, const float* before, int64_t padded) {
  vec top = splat(-INFINITY), sum = {};
  for (int64_t v = 0; v < padded; v += LANES) top = maximum(load(change + v) + load(before + v), top);
  const float peak = greatest(top);
  for (int64_t v = 0; v < padded; v += LANES) sum += exp2(load(change + v) + load(before + v) - peak);
  return peak + std::log2(total(sum));
}

// out [R]: the increases by R writes of one head
template <int R>
static void increases(const mllm::TokenScorer& s, int64_t head, const float* logs, const float* writes, float norm,
                      int64_t token, float* out) {
  const int64_t padded = s.padded();
  float* change = changes(WRITES * padded);
  all_words<R>(writes, s.operators.data() + head * s.width * padded, s.width, padded, norm * LOG2_E, change);
  const float* before = logs + head / s.heads * padded;
  for (int r = 0; r < R; ++r)
    out[r] = (change[r * padded + token] - log_sum(change + r * padded, before, padded)) * LN_2;
}

static void score_heads(const mllm::TokenScorer& s, const mllm::ScoredToken& p) {
  const int64_t padded = s.padded();
  const float norm = norm_of(s, p.final);
  for (int64_t l = 0; l < s.layers; ++l) {
    float* row = p.logs + l * padded;
    all_words<1>(p.residual + l * s.hidden, s.words.data(), s.hidden, padded, norm * LOG2_E, row);
    std::fill(row + s.vocab, row + padded, -INFINITY);
    float peak = -INFINITY, sum = 0;
    for (int64_t v = 0; v < s.vocab; ++v) peak = std::max(peak, row[v]);
    for (int64_t v = 0; v < s.vocab; ++v) sum += std::exp2(row[v] - peak);
    const float all = peak + std::log2(sum);
    for (int64_t v = 0; v < padded; ++v) row[v] = row[v] - all < LEAST ? LEAST : row[v] - all;  // NaN stays
  }
  for (int64_t h = 0; h < s.layers * s.heads; ++h)
    increases<1>(s, h, p.logs, p.output + h * s.width, norm, p.token, p.scores + h);
}

static void score_positions(const mllm::TokenScorer& s, const mllm::ScoredPositions& p) {
  const float norm = norm_of(s, p.final);
  for (size_t i = 0; i < p.heads.size(); ++i) {
    const float* values = p.values + i * p.positions * s.width;
    float* out = p.scores + i * p.positions;
    int64_t n = 0;
    for (; n + WRITES <= p.positions; n += WRITES)
      increases<WRITES>(s, p.heads[i], p.logs, values + n * s.width, norm, p.token, out + n);
    for (; n < p.positions; ++n)
      increases<1>(s, p.heads[i], p.logs, values + n * s.width, norm, p.token, out + n);
  }
}
