// Rows that go against a weight of type T, packed [step][row][STEP] by blocks of up to MOST rows, and their products.
// Included inside a namespace, once an instruction set, after cpu/products.h: no include guard. With MLLM_PAIRS bfloat16
// is multiplied in pairs, and the rows are rounded to it; else it is widened as it is read.

template <typename T>
struct PackedRows {
  static constexpr int64_t STEP = LANES;

  // Puts LANES channels of a row into its block.
  static void put(float* block, int64_t rows, int64_t row, int64_t channel, vec x) {
    store(block + channel * rows + row * LANES, x);
  }
  static void product(int64_t rows, const float* x, const T* weight, int64_t stride, int64_t depth, const char* next,
                      int lines, float (&out)[MOST][WEIGHTS]) {
    multiply(rows, x, weight, stride, depth, next, lines, out);
  }
  static const float* wide(const T* weight, int64_t depth, int64_t blocks) { return widened(weight, depth, depth, blocks); }
};

#if defined(MLLM_PAIRS)
// As multiply() of cpu/products.h, for a depth that is a multiple of 2 * LANES.
template <int ROWS>
static inline void multiply_pairs(const uint16_t* x, const uint16_t* weight, int64_t stride, int64_t depth,
                                  const char* next, int lines, float (&out)[MOST][WEIGHTS]) {
  constexpr int STEP = 2 * LANES;
  vec sum[ROWS][WEIGHTS] = {};
  for (int64_t k = 0; k < depth; k += STEP, x += ROWS * STEP) {
    for (int i = 0; i < lines; ++i, next += LINE) __builtin_prefetch(next, 0, 2);
    __m512bh w[WEIGHTS];
#pragma GCC unroll 4
    for (int j = 0; j < WEIGHTS; ++j) w[j] = (__m512bh)_mm512_loadu_si512(weight + j * stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh one = (__m512bh)_mm512_loadu_si512(x + r * STEP);
#pragma GCC unroll 4
      for (int j = 0; j < WEIGHTS; ++j) sum[r][j] = (vec)_mm512_dpbf16_ps((__m512)sum[r][j], one, w[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) totals(sum[r], out[r]);
}

template <>
struct PackedRows<uint16_t> {
  static constexpr int64_t STEP = 2 * LANES;

  static void put(float* block, int64_t rows, int64_t row, int64_t channel, vec x) {
    uint16_t* to = reinterpret_cast<uint16_t*>(block) + channel / STEP * STEP * rows + row * STEP + channel % STEP;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
  static const float* wide(const uint16_t*, int64_t, int64_t) { return nullptr; }
  static void product(int64_t rows, const float* x, const uint16_t* weight, int64_t stride, int64_t depth,
                      const char* next, int lines, float (&out)[MOST][WEIGHTS]) {
    const uint16_t* pairs = reinterpret_cast<const uint16_t*>(x);
    switch (rows) {
      case 1: return multiply_pairs<1>(pairs, weight, stride, depth, next, lines, out);
      case 2: return multiply_pairs<2>(pairs, weight, stride, depth, next, lines, out);
      case 3: return multiply_pairs<3>(pairs, weight, stride, depth, next, lines, out);
      case 4: return multiply_pairs<4>(pairs, weight, stride, depth, next, lines, out);
      case 5: return multiply_pairs<5>(pairs, weight, stride, depth, next, lines, out);
      default: return multiply_pairs<6>(pairs, weight, stride, depth, next, lines, out);
    }
  }
};
#endif
