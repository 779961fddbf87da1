// What cpu/each_isa.h compiles once an instruction set. A tile is WEIGHTS rows of the weight against up to MOST rows of
// x, its sums in registers; the tile after it is fetched meanwhile. The weight is read once, in order.
#include "../cpu/lanes.h"

constexpr int WEIGHTS = 4, MOST = LANES == 16 ? 6 : 2;  // WEIGHTS * MOST sums, WEIGHTS + 1 operands
constexpr int LINE = 64;                                // bytes

static inline void put(float* to, float x) { *to = x; }
static inline void put(uint16_t* to, float x) { *to = mllm::float_to_bfloat16(x); }

#if LANES == 16 && defined(MLLM_X86)
// a and b in turn, half as many summands of each
static inline vec in_turn(vec a, vec b) {
  return (vec)_mm512_unpacklo_ps((__m512)a, (__m512)b) + (vec)_mm512_unpackhi_ps((__m512)a, (__m512)b);
}
#endif

// The totals of four vectors.
static inline void totals(const vec (&x)[WEIGHTS], float (&out)[WEIGHTS]) {
#if LANES == 16 && defined(MLLM_X86)
  const __m512d a = (__m512d)in_turn(x[0], x[1]), b = (__m512d)in_turn(x[2], x[3]);
  const __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int j = 0; j < WEIGHTS; ++j) out[j] = total(x[j]);
#endif
}

// out[r][j] = sums of ROWS rows of x, packed [step][row][LANES], . weight [WEIGHTS][depth], but for the last depth %
// LANES. Each step fetches `lines` of what is read next.
template <int ROWS, typename T>
static inline void multiply(const float* x, const T* weight, int64_t depth, const char* next, int lines,
                            float (&out)[MOST][WEIGHTS]) {
  vec sum[ROWS][WEIGHTS] = {};
  for (int64_t k = 0; k + LANES <= depth; k += LANES, x += ROWS * LANES) {
    for (int i = 0; i < lines; ++i, next += LINE) __builtin_prefetch(next, 0, 2);
    vec w[WEIGHTS];
#pragma GCC unroll 4
    for (int j = 0; j < WEIGHTS; ++j) w[j] = load(weight + j * depth + k);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vec one = load(x + r * LANES);
#pragma GCC unroll 4
      for (int j = 0; j < WEIGHTS; ++j) sum[r][j] += one * w[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) totals(sum[r], out[r]);
}

template <typename T>
static void multiply(int64_t rows, const float* x, const T* weight, int64_t depth, const char* next, int lines,
                     float (&out)[MOST][WEIGHTS]) {
  switch (rows) {
    case 1: return multiply<1>(x, weight, depth, next, lines, out);
    case 2: return multiply<2>(x, weight, depth, next, lines, out);
#if LANES == 16
    case 3: return multiply<3>(x, weight, depth, next, lines, out);
    case 4: return multiply<4>(x, weight, depth, next, lines, out);
    case 5: return multiply<5>(x, weight, depth, next, lines, out);
    default: return multiply<6>(x, weight, depth, next, lines, out);
#endif
  }
}

// Kept by the thread: a decoder calls this a hundred times a token.
static mllm::Floats& scratch() {
  static thread_local mllm::Floats floats;
  return floats;
}

// One call: x packed block by block, the tiles, and what is left beside them.
template <typename X, typename W>
struct Layer {
  static constexpr int EACH = std::max<int>(1, WEIGHTS * LANES * sizeof(W) / LINE);  // lines of a tile a step
  const mllm::SkinnyLinear& p;
  const X* x = static_cast<const X*>(p.x);
  const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
  X* out = static_cast<X*>(p.out);
  const int64_t blocks = (p.rows + MOST - 1) / MOST, whole = p.depth / LANES * LANES;
  mllm::Floats& packed;

  explicit Layer(const mllm::SkinnyLinear& problem) : p(problem), packed(scratch()) {
    packed.resize(p.rows * whole);
    for (int64_t b = 0; b < blocks; ++b) {
      float* to = packed.data() + first(b) * whole;
      for (int64_t k = 0; k < whole; k += LANES)
        for (int64_t r = first(b); r < first(b + 1); ++r, to += LANES) store(to, load(x + r * p.depth + k));
    }
  }
  int64_t first(int64_t block) const { return p.rows * block / blocks; }

  void tile(int64_t n) const {
    float sum[MOST][WEIGHTS];
    const W* w = weight + n * p.depth;
    // the first blocks share the fetching of the next tile, so that memory is read while all of them multiply
    const int64_t sharing = std::min<int64_t>(blocks, 4), lines = (EACH + sharing - 1) / sharing;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t from = first(b), count = first(b + 1) - from;
      const char* next = reinterpret_cast<const char*>(w + WEIGHTS * p.depth) + b * lines * LINE * (whole / LANES);
      multiply(count, packed.data() + from * whole, w, p.depth, next, b < sharing ? lines : 0, sum);
      if (whole < p.depth) add_rest(from, count, n, sum);
      for (int64_t r = 0; r < count; ++r)
        for (int j = 0; j < WEIGHTS; ++j)
          put(out + (from + r) * p.columns + n + j, bias ? sum[r][j] + widen(bias[n + j]) : sum[r][j]);
    }
  }
  __attribute__((noinline)) void add_rest(int64_t from, int64_t count, int64_t n, float (&sum)[MOST][WEIGHTS]) const {
    for (int64_t r = 0; r < count; ++r)
      for (int j = 0; j < WEIGHTS; ++j) sum[r][j] += rest(from + r, n + j);
  }
  float rest(int64_t r, int64_t n) const {
    float sum = 0;
    for (int64_t e = whole; e < p.depth; ++e) sum += widen(x[r * p.depth + e]) * widen(weight[n * p.depth + e]);
    return sum;
  }
  // One row of the weight.
  void column(int64_t n) const {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t from = first(b), count = first(b + 1) - from;
      for (int64_t r = 0; r < count; ++r) {
        vec sum = {};
        const float* at = packed.data() + from * whole + r * LANES;
        for (int64_t k = 0; k < whole; k += LANES, at += count * LANES)
          sum += load(at) * load(weight + n * p.depth + k);
        put(out + (from + r) * p.columns + n, total(sum) + rest(from + r, n) + (bias ? widen(bias[n]) : 0.0f));
      }
    }
  }
};

template <typename X, typename W>
static void skinny_linear(const mllm::SkinnyLinear& p) {
  const Layer<X, W> layer(p);
  const int64_t tiles = p.columns / WEIGHTS;
  const int64_t tile_bytes = WEIGHTS * p.depth * static_cast<int64_t>(sizeof(W));
  const int64_t run = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, tile_bytes));  // tiles
  std::atomic<int64_t> next{0};
  // reading a byte takes as long as four operations or more
  const double work = std::max<double>(2 * p.rows, 4 * sizeof(W)) * p.columns * p.depth;
  mllm::parallel(mllm::worthwhile_threads(p.threads, work), [&](int) {
    for (int64_t from; (from = run * next++) < tiles;)
      for (int64_t t = from; t < std::min(from + run, tiles); ++t) layer.tile(t * WEIGHTS);
  });
  for (int64_t n = tiles * WEIGHTS; n < p.columns; ++n) layer.column(n);
}

static void skinny_linear(const mllm::SkinnyLinear& p) {
  if (p.rows_bfloat16) return skinny_linear<uint16_t, uint16_t>(p);
  p.weight_bfloat16 ? skinny_linear<float, uint16_t>(p) : skinny_linear<float, float>(p);
}
