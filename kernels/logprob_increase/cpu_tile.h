// What every CPU path shares: the problem, and the running sums behind log2 sum_v 2^x.
// Included inside a namespace, once an instruction set, after cpu/vector.h: no include guard.

// log2(e) * cap * (tanh((raw + x) / cap) - tanh(raw / cap)), the increase of a soft-capped logit.
static inline vec capped(vec x, float raw, float cap) {
  const float log2e = 1.4426950408889634f;
  const vec twice = (x + raw) * (2 * log2e / cap);
  const vec e = exp2(twice < 126.0f ? twice : splat(126.0f));
  return log2e * cap * ((1.0f - std::tanh(raw / cap)) - 2.0f / (e + 1.0f));
}

constexpr float LOG2E = 1.4426950408889634f;
// A log-probability below the smallest float64: the word cannot be said. Kept apart from the running peak, which such
// words would drag far from all others.
constexpr float NEVER = -745.0f * LOG2E;

// What the group says of the words of one block, copied so that it ends with the block's padding: padded
// words have probability 0.
struct Words {
  std::vector<float> base, lean, raw;

  explicit Words(int64_t most) : base(most), lean(most), raw(most) {}

  void fill(const mllm::Problem& p, int group, int64_t word, int64_t words) {
    const int64_t here = std::min(words, p.vocab - word), from = (p.source ? p.source[group] : p.first + group) * p.vocab + word;
    for (int64_t v = 0; v < here; ++v) {
      const float x = p.base[from + v] * LOG2E;
      base[v] = x <= NEVER ? -INFINITY : x;
    }
    std::fill(base.begin() + here, base.begin() + words, -INFINITY);
    if (p.lean) std::copy_n(p.lean + from, here, lean.begin());
    if (p.raw) std::copy_n(p.raw + from, here, raw.begin());
  }
};

// Where the accumulators of a tile begin: base - peak, so that they end as x - peak at no further cost.
// With a cap the end is not linear in the accumulator, and they begin at 0.
template <int ROWS, int NV>
static inline void begin(vec (&x)[ROWS][NV], const mllm::Problem& p, const Words& words, int64_t word,
                         const float* shift, const float* peak) {
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const vec top = load(peak + j * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) x[r][j] = p.cap > 0 ? (vec){} : words.base[word + r] - top;
    if (p.lean) {
      const vec s = load(shift + j * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) x[r][j] += words.lean[word + r] * s;
    }
  }
}

// Adds ROWS finished words to the running sums of NV * LANES positions. The sums are relative to a running
// peak that moves only by more than 8 powers of two, so that rescaling is rare.
template <int ROWS, int NV>
static inline void absorb(vec (&x)[ROWS][NV], const mllm::Problem& p, const Words& words, int64_t word, float* peak,
                          float* sum) {
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    if (p.cap > 0) {
      const vec top = load(peak + j * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r)
        x[r][j] = capped(x[r][j], words.raw[word + r], p.cap) + (words.base[word + r] - top);
    }
    vec most = x[0][j];
#pragma GCC unroll 16
    for (int r = 1; r < ROWS; ++r) most = maximum(most, x[r][j]);
    vec total = load(sum + j * LANES);
    const ivec unset = total < mllm::Sums::NOTHING;
    if (any((most > 8.0f) | (unset & (most != 0.0f)))) {
      const vec step = unset ? (most > -1e30f ? most : (vec){}) : maximum(most, (vec){});
      total = unset ? (vec){} : total * exp2(-step);
      store(peak + j * LANES, load(peak + j * LANES) + step);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) x[r][j] -= step;
    }
    vec part = exp2(x[0][j]);
#pragma GCC unroll 16
    for (int r = 1; r < ROWS; ++r) part += exp2(x[r][j]);
    store(sum + j * LANES, total + part);
  }
}
