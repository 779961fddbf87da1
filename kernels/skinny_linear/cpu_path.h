// What cpu/each_isa.h compiles once an instruction set. A tile is WEIGHTS rows of the weight against up to MOST rows of
// x, its sums in registers; the tile after it is fetched meanwhile. The weight is read once, in order.
#include "../cpu/lanes.h"
#include "../cpu/products.h"

static inline void put(float* to, float x) { *to = x; }
static inline void put(uint16_t* to, float x) { *to = mllm::float_to_bfloat16(x); }
static inline void put(float* to, const float (&x)[WEIGHTS]) { std::memcpy(to, x, sizeof x); }
static inline void put(uint16_t* to, const float (&x)[WEIGHTS]) {  // as float_to_bfloat16, all at once
  typedef uint32_t bits __attribute__((vector_size(4 * WEIGHTS)));
  typedef uint16_t halves __attribute__((vector_size(2 * WEIGHTS)));
  bits one;
  std::memcpy(&one, x, sizeof one);
  const bits nearest = (one + 0x7fffu + (one >> 16 & 1u)) >> 16, quiet = one >> 16 | 0x40u;
  const halves found = __builtin_convertvector((one & 0x7fffffffu) > 0x7f800000u ? quiet : nearest, halves);
  std::memcpy(to, &found, sizeof found);
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
    std::atomic<int64_t> next{0};
    // a byte that is moved takes as long as some operations
    mllm::parallel(mllm::worthwhile_threads(p.threads, 4.0 * p.rows * p.depth), [&](int) {
      for (int64_t b; (b = next++) < blocks;) pack(b);
    });
  }
  void pack(int64_t b) const {
    float* to = packed.data() + first(b) * whole;
    for (int64_t k = 0; k < whole; k += LANES)
      for (int64_t r = first(b); r < first(b + 1); ++r, to += LANES) store(to, load(x + r * p.depth + k));
  }
  int64_t first(int64_t block) const { return p.rows * block / blocks; }

  // Tiles [from, to), against blocks of rows that stay in the second cache with them, one after the other.
  void tiles(int64_t from, int64_t to) const {
    const int64_t most = std::max<int64_t>(1, (1 << 19) / std::max<int64_t>(1, MOST * whole * 4));
    for (int64_t b = 0; b < blocks; b += most)
      for (int64_t t = from; t < to; ++t) tile(t * WEIGHTS, b, std::min(b + most, blocks));
  }
  void tile(int64_t n, int64_t begin, int64_t end) const {
    float sum[MOST][WEIGHTS];
    const W* w = weight + n * p.depth;
    // the first blocks share the fetching of the next tile, so that memory is read while all of them multiply
    const int64_t sharing = std::min<int64_t>(blocks, 4), lines = (EACH + sharing - 1) / sharing;
    const float* wide = widened(w, p.depth, whole, end - begin);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t from = first(b), count = first(b + 1) - from;
      const char* next = reinterpret_cast<const char*>(w + WEIGHTS * p.depth) + b * lines * LINE * (whole / LANES);
      const float* rows = packed.data() + from * whole;
      const int fetched = b < sharing ? lines : 0;
      if (wide)
        multiply(count, rows, wide, whole, whole, next, fetched, sum);
      else
        multiply(count, rows, w, p.depth, p.depth, next, fetched, sum);
      if (whole < p.depth) add_rest(from, count, n, sum);
      for (int64_t r = 0; r < count; ++r) {
        if (bias)
          for (int j = 0; j < WEIGHTS; ++j) sum[r][j] += widen(bias[n + j]);
        put(out + (from + r) * p.columns + n, sum[r]);
      }
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
      layer.tiles(from, std::min(from + run, tiles));
  });
  for (int64_t n = tiles * WEIGHTS; n < p.columns; ++n) layer.column(n);
}

static void skinny_linear(const mllm::SkinnyLinear& p) {
  if (p.rows_bfloat16) return skinny_linear<uint16_t, uint16_t>(p);
  p.weight_bfloat16 ? skinny_linear<float, uint16_t>(p) : skinny_linear<float, float>(p);
}
