// Keys packed with the keys in the lanes, and a block of rows times a chunk of them. Included like cpu_prefill.h.

// Packs up to CHUNK keys as [depth][CHUNK] floats, zeros beside them.
template <typename T>
static void pack_keys(const T* from, int64_t stride, int64_t count, int64_t width, float* to) {
  constexpr int64_t chunk = VECS * LANES;
  for (int64_t e0 = 0; e0 < width; e0 += 16)  // a cache line of each key at a time
    for (int64_t i = 0; i < chunk; ++i)
      for (int64_t e = e0; e < std::min<int64_t>(e0 + 16, width); ++e)
        to[e * chunk + i] = i < count ? widen(from[i * stride + e]) : 0.0f;
}

// x = ROWS rows [ROWS][width] . one packed chunk.
static inline void multiply_keys(const float* rows, const float* chunk, int64_t width, vec (&x)[ROWS][VECS]) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) x[r][j] = (vec){};
  for (int64_t e = 0; e < width; ++e) {
    vec k[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) k[j] = load(chunk + (e * VECS + j) * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vec q = splat(rows[r * width + e]);
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) x[r][j] += q * k[j];
    }
  }
}
