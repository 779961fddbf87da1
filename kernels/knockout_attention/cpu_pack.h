// Packs up to CHUNK keys as [unit][CHUNK], zeros beside them. A unit is a number, or a pair of bfloat16. Included like
// cpu_singles.h, before it.

constexpr int CHUNK = VECS * LANES;  // keys
constexpr int HELD = 4 * CHUNK;      // keys whose weights are held before their values are added

typedef float quad __attribute__((vector_size(16)));

struct Pair {
  uint16_t low, high;
};

static inline void read_unit(const float* from, float& to) { to = *from; }
static inline void read_unit(const uint16_t* from, float& to) { to = widen(*from); }
static inline void read_unit(const Pair* from, uint32_t& to) { std::memcpy(&to, from, 4); }

// Four units; pairs as the bits of floats, which are only moved.
static inline quad read_quad(const float* from) {
  quad x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
static inline quad read_quad(const uint16_t* from) {
  return quad{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
}
static inline quad read_quad(const Pair* from) { return read_quad(reinterpret_cast<const float*>(from)); }

static inline void transpose(quad (&x)[4]) {
#if defined(MLLM_X86)
  _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
#else
  const quad a = x[0], b = x[1], c = x[2], d = x[3];
  for (int i = 0; i < 4; ++i) x[i] = quad{a[i], b[i], c[i], d[i]};
#endif
}

// `row(i)` is where the i-th key begins.
template <typename Row, typename Unit>
static void pack_units(Row row, int64_t count, int64_t units, Unit* to) {
  constexpr int64_t LINE = 64 / sizeof(*row(0));
  for (int64_t begin = 0; begin < units; begin += LINE)  // a cache line of each key at a time
    for (int64_t i = 0; i < CHUNK; i += 4) {
      const int64_t end = std::min(begin + LINE, units);
      int64_t e = begin;
      for (int j = 0; j < 4; ++j) __builtin_prefetch(row(CHUNK + i + j) + begin, 0, 2);  // of the next chunk
      for (; i + 4 <= count && e + 4 <= end; e += 4) {
        quad x[4];
        for (int j = 0; j < 4; ++j) x[j] = read_quad(row(i + j) + e);
        transpose(x);
        for (int j = 0; j < 4; ++j) std::memcpy(to + (e + j) * CHUNK + i, &x[j], sizeof x[j]);
      }
      for (; e < end; ++e)
        for (int64_t j = i; j < i + 4; ++j) {
          to[e * CHUNK + j] = Unit(0);
          if (j < count) read_unit(row(j) + e, to[e * CHUNK + j]);
        }
    }
}
