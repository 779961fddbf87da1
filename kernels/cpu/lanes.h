// Numbers of either type, and reductions over lanes. Included inside a namespace, once an instruction set, after
// cpu/vector.h: no include guard. Needs cpu/bfloat16.h.

static inline float widen(float x) { return x; }
static inline float widen(uint16_t x) { return mllm::bfloat16_to_float(x); }

// to[0 .. count) = from * scale, the last few one by one.
static inline void store_scaled(const float* from, float scale, int64_t count, float* to) {
  int64_t e = 0;
  for (; e + LANES <= count; e += LANES) store(to + e, load(from + e) * scale);
  for (; e < count; ++e) to[e] = from[e] * scale;
}
static inline void store_scaled(const float* from, float scale, int64_t count, uint16_t* to) {
  for (int64_t e = 0; e < count; ++e) to[e] = mllm::float_to_bfloat16(from[e] * scale);
}

static inline float total(vec x) {
#if LANES == 16 && defined(MLLM_X86)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
#endif
}

static inline float greatest(vec x) {
#if LANES == 16 && defined(MLLM_X86)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// Whether a lane of a is above that of b.
static inline bool exceeds(vec a, vec b) {
#if LANES == 16 && defined(MLLM_X86)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
  return any(a > b);
#endif
}

template <typename T>
static inline float dot(const float* a, const T* b, int64_t count) {
  vec sum = {}, more = {};
  int64_t k = 0;
  for (; k + 2 * LANES <= count; k += 2 * LANES) {
    sum += load(a + k) * load(b + k);
    more += load(a + k + LANES) * load(b + k + LANES);
  }
  for (; k + LANES <= count; k += LANES) sum += load(a + k) * load(b + k);
  float all = total(sum + more);
  for (; k < count; ++k) all += a[k] * widen(b[k]);
  return all;
}
