// Matrix tiles (AMX) for float32 and bfloat16 operands. Included inside a namespace, with LANES 16: no include guard.
//
// A float32 is the sum of three bfloat16, its parts: high, middle and low. Of the nine products of two
// numbers' parts the six largest are taken; what the other three would add is below the rounding of float32.
// A bfloat16 operand has one part.

constexpr int SIDE = 32;         // rows, and columns, of a product: two tiles by two
constexpr int DEEP = 32;         // depth of a tile
constexpr int TILE = 16 * DEEP;  // bfloat16s in a tile
constexpr int PARTS = 3;

using Halves = std::vector<uint16_t, mllm::CacheAligned<uint16_t>>;

typedef uint32_t bits __attribute__((vector_size(64)));

// A row of a tile is 16 pairs of bfloat16; which two depths make a pair is free, and d goes with d + 16.
static inline void store_pairs(uint16_t* to, bits low, bits high) {
  store(reinterpret_cast<float*>(to), (vec)(low >> 16 | (high & 0xffff0000u)));
}

static inline bits nearest_bfloat16(vec x) { return ((bits)x + 0x8000u) & 0xffff0000u; }

// The parts of 16 pairs (a, b), `part` values apart.
static inline void split_pairs(vec a, vec b, uint16_t* to, int64_t part) {
  for (int i = 0; i < PARTS - 1; ++i, to += part) {
    const bits near_a = nearest_bfloat16(a), near_b = nearest_bfloat16(b);
    store_pairs(to, near_a, near_b);
    a -= (vec)near_a;
    b -= (vec)near_b;
  }
  store_pairs(to, (bits)a, (bits)b);  // by now a bfloat16, or a NaN that the rounding would lose
}

static inline void split(const uint16_t* x, uint16_t* to, int64_t) {
  store_pairs(to, (bits)load(x), (bits)load(x + LANES));
}

static inline void split(const float* x, uint16_t* to, int64_t part) {
  split_pairs(load(x), load(x + LANES), to, part);
}

// Fills one tile of each part, `part` values apart, from up to 16 rows and DEEP columns; zeros beside them.
template <typename T>
static void split_tile(const T* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to, int64_t part) {
  for (int r = 0; r < 16; ++r) {
    const T* x = from + r * stride;
    T padded[DEEP];
    if (r >= rows || columns < DEEP) {
      std::fill_n(padded, DEEP, T(0));
      if (r < rows) std::copy_n(x, std::min<int64_t>(columns, DEEP), padded);
      x = padded;
    }
    split(x, to + r * DEEP, part);
  }
}

// The processor's tile registers, for as long as this lives: eight of 16 rows of 64 bytes.
struct TileRegisters {
  TileRegisters() {
    alignas(64) static const uint8_t settings[64] = {
        1,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,   // palette 1
        64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,   // bytes a row
        0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,   //
        16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0};  // rows
    _tile_loadconfig(settings);
  }
  ~TileRegisters() { _tile_release(); }
};

// The intrinsics do not tell the compiler which memory they read and write.
static inline void settle() { __asm__ volatile("" ::: "memory"); }

// Tiles 0..3 are a product [32][32] of floats with `stride` bytes between rows.
static inline void zero_product() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
static inline void load_product(const float* x, int64_t stride) {
  _tile_loadd(0, x, 4 * stride);
  _tile_loadd(1, x + 16, 4 * stride);
  _tile_loadd(2, x + 16 * stride, 4 * stride);
  _tile_loadd(3, x + 16 * stride + 16, 4 * stride);
}
static inline void store_product(float* x, int64_t stride) {
  _tile_stored(0, x, 4 * stride);
  _tile_stored(1, x + 16, 4 * stride);
  _tile_stored(2, x + 16 * stride, 4 * stride);
  _tile_stored(3, x + 16 * stride + 16, 4 * stride);
}

// Tiles 0..3 += a . b, one tile deep, both laid out [part][half][TILE]: each of the products of parts, in an order
// that changes one side at a time. a is in tiles 4 and 5, b in 6 and 7. A tile is loaded as soon as the last product
// that reads it is under way, so on entry a's and b's first parts are there (`load_first`), and on leaving those of
// `then_a` and `then_b`. `meanwhile` is called after each product. B_HALVES 1: the second half of b is empty.
enum Part { HIGH, MIDDLE, LOW };

template <int PART>
static inline void load_half(const uint16_t* x, int half_of_a_or_b) {
  const uint16_t* from = x + 2 * PART * TILE;
  switch (half_of_a_or_b) {
    case 4: _tile_loadd(4, from, 64); break;
    case 5: _tile_loadd(5, from + TILE, 64); break;
    case 6: _tile_loadd(6, from, 64); break;
    default: _tile_loadd(7, from + TILE, 64);
  }
}

template <int B_PARTS, int B_HALVES>
static inline void load_first(const uint16_t* a, const uint16_t* b) {
  load_half<HIGH>(a, 4);
  load_half<B_PARTS == 3 ? LOW : HIGH>(b, 6);
  load_half<HIGH>(a, 5);
  if (B_HALVES == 2) load_half<B_PARTS == 3 ? LOW : HIGH>(b, 7);
}

template <int A_PARTS, int B_PARTS, int B_HALVES, typename F>
static inline void multiply(const uint16_t* a, const uint16_t* b, const uint16_t* then_a, const uint16_t* then_b,
                            F meanwhile) {
  constexpr bool TWO = B_HALVES == 2;
#define MLLM_PRODUCT_THEN_B(PART)        \
  _tile_dpbf16ps(0, 4, 6);               \
  _tile_dpbf16ps(2, 5, 6);               \
  load_half<PART>(b, 6);                 \
  if (TWO) _tile_dpbf16ps(1, 4, 7);      \
  if (TWO) _tile_dpbf16ps(3, 5, 7);      \
  if (TWO) load_half<PART>(b, 7);        \
  meanwhile()
#define MLLM_PRODUCT_THEN_A(PART)        \
  _tile_dpbf16ps(0, 4, 6);               \
  if (TWO) _tile_dpbf16ps(1, 4, 7);      \
  load_half<PART>(a, 4);                 \
  _tile_dpbf16ps(2, 5, 6);               \
  if (TWO) _tile_dpbf16ps(3, 5, 7);      \
  load_half<PART>(a, 5);                 \
  meanwhile()
  if (B_PARTS == 3) {
    MLLM_PRODUCT_THEN_B(MIDDLE);
    if (A_PARTS == 3) {
      MLLM_PRODUCT_THEN_A(MIDDLE);
    }
    MLLM_PRODUCT_THEN_B(HIGH);
    if (A_PARTS == 3) {
      MLLM_PRODUCT_THEN_A(HIGH);
      MLLM_PRODUCT_THEN_A(LOW);
    }
  }
#undef MLLM_PRODUCT_THEN_A
#undef MLLM_PRODUCT_THEN_B
  constexpr Part FIRST = B_PARTS == 3 ? LOW : HIGH;
  _tile_dpbf16ps(0, 4, 6);
  if (TWO) _tile_dpbf16ps(1, 4, 7);
  load_half<HIGH>(then_a, 4);
  _tile_dpbf16ps(2, 5, 6);
  load_half<FIRST>(then_b, 6);
  if (TWO) _tile_dpbf16ps(3, 5, 7);
  load_half<HIGH>(then_a, 5);
  if (TWO) load_half<FIRST>(then_b, 7);
  meanwhile();
}
