// Numbers of either type, reductions over lanes, who is hidden from whom. Included inside a namespace,
// once an instruction set, after cpu/vector.h: no include guard.

typedef uint32_t bit_vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bit_vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

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

// Lanes whose keys, `key` and those after it, the row at `position` does not see: all ones there.
static inline ivec hidden(const mllm::Sight& sight, int64_t key, int64_t position, mllm::Bits closed) {
  ivec lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  const bit_vec bit = *reinterpret_cast<const bit_vec_unaligned*>(sight.bit.data() + key);
  const int32_t last = static_cast<int32_t>(position - key), first = static_cast<int32_t>(sight.first - key);
  return (lane > last) | (lane < first) | ((bit & closed) != 0);
}

// One row of the output and its log-sum-exp: `out` holds the values weighed by 2 ^ (score - peak), `sum` those weights'
// sum, 0 for a row that sees no key.
template <typename T>
static inline void write_row(const mllm::AttentionProblem& p, int64_t batch, int64_t head, int64_t row,
                             const float* out, float sum, float peak) {
  const bool seen = sum != 0;  // NaN too
  T* to = static_cast<T*>(p.out) + ((batch * p.rows + row) * p.heads + head) * p.width;
  if (seen) {
    store_scaled(out, 1.0f / sum, p.width, to);
  } else {
    std::fill_n(to, p.width, T(0));
  }
  if (p.lse)
    p.lse[(batch * p.heads + head) * p.rows + row] = seen ? (peak + std::log2(sum)) * 0.6931471805599453f : mllm::UNSET;
}
