// The operand and the writes as tiles of bfloat16. Included inside a namespace by cpu_amx.h: no include guard.

constexpr int STEPS = 4;             // tiles in a depth block
constexpr int PANELS_TOGETHER = 16;  // panels that meet a depth block before the next, if there are several

// The block's words in tiles [32 words][step][part][half], for the steps of one depth block.
template <typename T>
static void split_words(const mllm::Problem& p, int64_t word, int64_t words, int64_t step, int64_t steps,
                        uint16_t* to) {
  constexpr int parts = sizeof(T) == 4 ? PARTS : 1;
  for (int64_t w = 0; w < words; w += 16)
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t column = (step + k) * DEEP, row = std::min(word + w, p.vocab);
      split_tile(static_cast<const T*>(p.operand) + row * p.depth + column, p.depth, p.vocab - row, p.depth - column,
                 to + ((w / SIDE * steps + k) * parts * 2 + w / 16 % 2) * TILE, 2 * TILE);
    }
}

// Where the writes of a panel begin, at a step. Panels that meet the same words lie side by side.
static inline int64_t place(int64_t panels, int64_t panel, int64_t step, int64_t steps) {
  const int64_t start = step / STEPS * STEPS, here = std::min<int64_t>(STEPS, steps - start);
  return (start * panels + here * panel + step - start) * PARTS * 2 * TILE;
}

// The writes in tiles [depth block][panel][step][part][half], where a row of a tile is 16 pairs of depths.
static Halves split_writes(const mllm::Problem& p, const std::vector<mllm::Panel>& list, int64_t steps) {
  Halves packed(list.size() * steps * PARTS * 2 * TILE);
  alignas(64) uint16_t flat[PARTS * TILE];
  for (size_t i = 0; i < list.size(); ++i)
    for (int64_t k = 0; k < steps; ++k)
      for (int half = 0; half < 2; ++half) {
        const int first = std::min(16 * half, list[i].count);
        split_tile(p.writes + (list[i].row + first) * p.depth + k * DEEP, p.depth, list[i].count - first,
                   p.depth - k * DEEP, flat, TILE);
        for (int part = 0; part < PARTS; ++part) {
          uint16_t* to = packed.data() + place(list.size(), i, k, steps) + (part * 2 + half) * TILE;
          for (int pair = 0; pair < 16; ++pair)
            for (int r = 0; r < 16; ++r)
              std::memcpy(to + pair * 32 + r * 2, flat + part * TILE + r * DEEP + pair * 2, 4);
        }
      }
  return packed;
}
