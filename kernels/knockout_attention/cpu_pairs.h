// Products of bfloat16 in pairs (AVX512_BF16): an instruction multiplies 32 of them and adds up in float32, twice the
// rate of multiply-adds. A unit is a pair: of depths for the scores, of keys for the values. Included like
// cpu_singles.h, in a namespace of its own.

static inline vec add_products(vec sum, uint32_t a, vec b) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}

static inline vec load(const uint32_t* pairs) { return load(reinterpret_cast<const float*>(pairs)); }

struct Pairs {
  using Given = uint16_t;
  using Unit = uint32_t;
  static constexpr int64_t PER = 2;
  static constexpr bool VALUES_IN_PLACE = false;

  // Keys as [depth / 2][CHUNK].
  static void pack_keys(const uint16_t* from, int64_t stride, int64_t count, int64_t width, uint32_t* to) {
    const int64_t pairs = width / 2;
    pack_units([=](int64_t i) { return reinterpret_cast<const Pair*>(from + i * stride); }, count, pairs, to);
    if (width % 2)
      for (int64_t i = 0; i < CHUNK; ++i) to[pairs * CHUNK + i] = i < count ? from[i * stride + width - 1] : 0;
  }
  static void pack_query(const uint16_t* row, int64_t width, float, uint32_t* to) {
    if (width % 2) to[width / 2] = 0;  // an even width has no half pair, and no room for one
    std::memcpy(to, row, 2 * width);
  }
  // [CHUNK / 2][wide]: of each column the pair of two keys.
  static void pack_values(const uint16_t* from, int64_t stride, int64_t count, int64_t width, int64_t wide,
                          uint32_t* to) {
    for (int64_t i = 0; i < count; i += 2, to += wide) {
      const uint16_t *low = from + i * stride, *high = low + stride;
      for (int64_t e = 0; e < width; ++e) to[e] = low[e] | (i + 1 < count ? static_cast<uint32_t>(high[e]) << 16 : 0);
      std::fill(to + width, to + wide, 0);
    }
  }
  // Scores in powers of two: scaled here, a scaled query would have to be rounded again.
  template <int NV>
  static void multiply(const uint32_t* rows, const uint32_t* chunk, int64_t depth, float scale, vec (&x)[ROWS][NV]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[r][j] = (vec){};
    for (int64_t e = 0; e < depth; ++e) {
      vec k[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) k[j] = load(chunk + (e * VECS + j) * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) x[r][j] = add_products(x[r][j], rows[r * depth + e], k[j]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[r][j] *= scale;
  }
  static void keep_weights(vec y, uint32_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)y));
  }

  // By a power of two: nothing is rounded.
  static void scale_weights(uint32_t* weights, int64_t count, float factor) {
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
      uint16_t pair[2];
      std::memcpy(pair, weights + i, sizeof pair);
      for (uint16_t& x : pair) x = mllm::float_to_bfloat16(mllm::bfloat16_to_float(x) * factor);
      std::memcpy(weights + i, pair, sizeof pair);
    }
  }

  // sum += weights [ROWS][HELD / 2] . `count` pairs of values.
  template <int NV>
  static void add(const uint32_t* weights, const uint32_t* v, int64_t stride, int64_t count, vec (&sum)[ROWS][NV]) {
    for (int64_t k = 0; k < count; ++k) {
      vec x[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[j] = load(v + k * stride + j * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[r][j] = add_products(sum[r][j], weights[r * HELD / 2 + k], x[j]);
    }
  }
};
