// Products of a few rows with rows of a weight, WEIGHTS against up to MOST at a time, their sums in registers. Included
// inside a namespace, once an instruction set, after cpu/lanes.h: no include guard.

constexpr int WEIGHTS = 4, MOST = LANES == 16 ? 6 : 2;  // WEIGHTS * MOST sums, WEIGHTS + 1 operands
constexpr int LINE = 64;                                // bytes

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

// out[r][j] = sums of ROWS rows of x, packed [step][row][LANES], . weight [WEIGHTS][depth], whose rows are `stride` apart,
// but for the last depth % LANES. Each step fetches `lines` of what is read next.
template <int ROWS, typename T>
static inline void multiply(const float* x, const T* weight, int64_t stride, int64_t depth, const char* next, int lines,
                            float (&out)[MOST][WEIGHTS]) {
  vec sum[ROWS][WEIGHTS] = {};
  for (int64_t k = 0; k + LANES <= depth; k += LANES, x += ROWS * LANES) {
    for (int i = 0; i < lines; ++i, next += LINE) __builtin_prefetch(next, 0, 2);
    vec w[WEIGHTS];
#pragma GCC unroll 4
    for (int j = 0; j < WEIGHTS; ++j) w[j] = load(weight + j * stride + k);
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
static void multiply(int64_t rows, const float* x, const T* weight, int64_t stride, int64_t depth, const char* next,
                     int lines, float (&out)[MOST][WEIGHTS]) {
  switch (rows) {
    case 1: return multiply<1>(x, weight, stride, depth, next, lines, out);
    case 2: return multiply<2>(x, weight, stride, depth, next, lines, out);
#if LANES == 16
    case 3: return multiply<3>(x, weight, stride, depth, next, lines, out);
    case 4: return multiply<4>(x, weight, stride, depth, next, lines, out);
    case 5: return multiply<5>(x, weight, stride, depth, next, lines, out);
    default: return multiply<6>(x, weight, stride, depth, next, lines, out);
#endif
  }
}

// The tile [WEIGHTS][depth] of a weight, widened once, where several blocks of rows go against it: to widen as it is read
// takes the units that multiply. Null where it is not to be had: numbers that are wide already, few blocks, or a tile
// that the first cache could not hold. It lies there until the thread asks for another.
constexpr int64_t WIDEN_FROM = 3, WIDEN_MOST = 1 << 13;  // blocks, and numbers

static inline const float* widened(const float*, int64_t, int64_t, int64_t) { return nullptr; }
static inline const float* widened(const uint16_t* weight, int64_t stride, int64_t depth, int64_t blocks) {
  if (blocks < WIDEN_FROM || WEIGHTS * depth > WIDEN_MOST) return nullptr;
  alignas(LINE) static thread_local float tile[WIDEN_MOST];
  for (int j = 0; j < WEIGHTS; ++j)
    for (int64_t k = 0; k < depth; k += LANES) store(tile + j * depth + k, load(weight + j * stride + k));
  return tile;
}
