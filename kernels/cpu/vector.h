// Vectors of LANES floats in the compiler's own vector extension, so that one text serves AVX-512, AVX2
// and every other processor. Included inside a namespace, once an instruction set: no include guard.
// Needs LANES and <cstdint>, <cstring>.

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));  // whose sums and shifts may overflow
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }
static inline vec load(const uint16_t* p) {  // bfloat16
#if LANES == 16 && defined(MLLM_X86)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif LANES == 8 && defined(MLLM_X86)
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  ivec x;
  for (int i = 0; i < LANES; ++i) x[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return (vec)x;
#endif
}
static inline void store(float* p, vec x) { *reinterpret_cast<vec_unaligned*>(p) = x; }
static inline vec splat(float x) { return x - (vec){}; }
static inline vec maximum(vec a, vec b) { return a > b ? a : b; }  // b where a is NaN

static inline bool any(ivec mask) {
#if LANES == 16 && defined(MLLM_X86)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LANES == 8 && defined(MLLM_X86)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t all = 0;
  for (int i = 0; i < LANES; ++i) all |= mask[i];
  return all != 0;
#endif
}

// 2^x for x <= 127 by a minimax polynomial, exact at 0; below 2^-126 something of no weight; NaN for NaN.
#if LANES == 16 && defined(MLLM_X86)
static inline vec exp2(vec x) {  // 8e-8 relative; two instructions do the splitting and the scaling
  const vec r = (vec)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
  vec p = splat(0.0018671302823349833f);
  p = p * r + 0.009017029777169228f;
  p = p * r + 0.05579991266131401f;
  p = p * r + 0.24016444385051727f;
  p = p * r + 0.6931512951850891f;
  p = p * r + 1.0f;
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
static inline vec exp2(vec x) {  // 2e-9 relative
  x = maximum(splat(-126.0f), x);  // NaN stays NaN
  const vec round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const vec shifted = x + round;
  const vec r = x - (shifted - round);
  vec p = splat(0.0001534581242594868f);
  p = p * r + 0.0013399930903688073f;
  p = p * r + 0.009618489071726799f;
  p = p * r + 0.05550328642129898f;
  p = p * r + 0.24022646248340607f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.0f;
  return (vec)((uvec)p + ((uvec)shifted << 23));
}
#endif
