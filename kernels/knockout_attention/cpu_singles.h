// Products of float32, one number a unit; bfloat16 operands are widened as they are packed. Included like
// cpu_prefill.h, before it, after cpu_pack.h.

// Keys as [depth][CHUNK].
template <typename T>
static void pack_single_keys(const T* from, int64_t stride, int64_t count, int64_t width, float* to) {
  pack_units([=](int64_t i) { return from + i * stride; }, count, width, to);
}

// x = ROWS rows [ROWS][width] . the first NV vectors of one packed chunk.
template <int NV>
static inline void multiply_keys(const float* rows, const float* chunk, int64_t width, vec (&x)[ROWS][NV]) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[r][j] = (vec){};
  for (int64_t e = 0; e < width; ++e) {
    vec k[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) k[j] = load(chunk + (e * VECS + j) * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vec q = splat(rows[r * width + e]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[r][j] += q * k[j];
    }
  }
}

template <typename T>
struct Singles {
  using Given = T;
  using Unit = float;
  static constexpr int64_t PER = 1;
  static constexpr bool VALUES_IN_PLACE = sizeof(T) == 4;

  static constexpr auto pack_keys = pack_single_keys<T>;
  static void pack_query(const T* row, int64_t width, float scale, float* to) {
    for (int64_t e = 0; e < width; ++e) to[e] = widen(row[e]) * scale;
  }
  static void pack_values(const T* from, int64_t stride, int64_t count, int64_t width, int64_t wide, float* to) {
    for (int64_t i = 0; i < count; ++i, to += wide) {
      for (int64_t e = 0; e < width; ++e) to[e] = widen(from[i * stride + e]);
      std::fill(to + width, to + wide, 0.0f);
    }
  }
  // Scores in powers of two: the queries are scaled already.
  template <int NV>
  static void multiply(const float* rows, const float* chunk, int64_t depth, float, vec (&x)[ROWS][NV]) {
    multiply_keys(rows, chunk, depth, x);
  }
  static void keep_weights(vec y, float* to) { store(to, y); }
  static void scale_weights(float* weights, int64_t count, float factor) {
    for (int64_t k = 0; k < count; ++k) weights[k] *= factor;
  }

  // sum += weights [ROWS][HELD] . `count` values. A strip of them is too far apart for the first cache to hold and for
  // the processor to foresee: those AHEAD are asked for.
  template <int NV>
  static void add(const float* weights, const float* v, int64_t stride, int64_t count, vec (&sum)[ROWS][NV]) {
    constexpr int64_t AHEAD = 8;
    for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) __builtin_prefetch(v + (k + AHEAD) * stride + j * LANES, 0, 3);
      vec x[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[j] = load(v + k * stride + j * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const vec w = splat(weights[r * HELD + k]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[r][j] += w * x[j];
      }
    }
  }
};
