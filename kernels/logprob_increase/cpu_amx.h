// The path of matrix tiles (AMX). Included inside a namespace, with LANES 16: no include guard.
//
// The writes are float32, of three parts (cpu/tiles.h); a bfloat16 operand's one part meets all three.
//
// Two tiles of 16 words meet two of 16 positions, 32 deep. A block of words is split once for the panels it
// meets (192 KiB at a depth of 128, for the second cache). While the tiles of one product fill, the vector
// units add the product before it to the running sums.

#include "cpu_amx_split.h"

// The part of the operand that comes next, brought into the second cache a little each turn.
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0;
  int64_t turns = 1, turn = 0, done = 0;

  void advance() {
    for (const int64_t until = std::min(rows, ++turn * rows / turns); done < until; ++done)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + done * stride + at, 0, 2);
  }
};

// A product [32 words][32 positions] that has yet to join the running sums.
struct Pending {
  const float* x = nullptr;
  int64_t word = 0;
  int vectors = 0;
  const float* shift = nullptr;
  float *peak = nullptr, *sum = nullptr;
  int row = 0, column = 0;

  // Adds the next few words of LANES positions to the running sums: about what fits beside four tile products.
  __attribute__((noinline)) void advance(const mllm::Problem& p, const Words& told) {
    constexpr int ROWS = 4;
    vec part[ROWS][1];
    begin<ROWS, 1>(part, p, told, word + row, shift + column, peak + column);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) part[r][0] += load(x + (row + r) * SIDE + column);
    absorb<ROWS, 1>(part, p, told, word + row, peak + column, sum + column);
    column = column + LANES < vectors * LANES ? column + LANES : 0;
    if (column == 0 && (row += ROWS) == SIDE) x = nullptr;
  }
  void finish(const mllm::Problem& p, const Words& told) {
    while (x) advance(p, told);
  }
};

// x = 32 words . one panel over `steps` tiles of depth, added to what x holds if `more`; meanwhile `done`
// joins the running sums.
template <int WORD_PARTS, int NV>
static void product(const mllm::Problem& p, const Words& told, Pending& done, Ahead& ahead,
                    const uint16_t* words, const uint16_t* positions, int64_t steps, bool more, float* x) {
  settle();
  more ? load_product(x, SIDE) : zero_product();
  load_first<PARTS, NV>(words, positions);
  for (int64_t k = 0; k < steps; ++k) {
    ahead.advance();
    const uint16_t *word = words + k * WORD_PARTS * 2 * TILE, *position = positions + k * PARTS * 2 * TILE;
    const int64_t more_words = k + 1 < steps ? WORD_PARTS * 2 * TILE : 0;
    const int64_t more_positions = k + 1 < steps ? PARTS * 2 * TILE : 0;
    multiply<WORD_PARTS, PARTS, NV>(word, position, word + more_words, position + more_positions, [&] {
      if (done.x) done.advance(p, told);
    });
  }
  done.finish(p, told);
  store_product(x, SIDE);
  settle();
}

template <typename T>
static void log_sum_exp(const mllm::Problem& p) {
  constexpr int parts = sizeof(T) == 4 ? PARTS : 1;
  const std::vector<mllm::Panel> list = mllm::panels(p, SIDE);
  const int64_t panels = list.size(), steps = (p.depth + DEEP - 1) / DEEP;
  const int64_t together = steps <= STEPS ? panels : PANELS_TOGETHER;
  const Halves packed = split_writes(p, list, steps);
  mllm::Floats shifts(panels * SIDE, 0.0f);
  for (int64_t i = 0; p.shift && i < panels; ++i)
    std::copy_n(p.shift + list[i].row, list[i].count, shifts.data() + i * SIDE);

  const int threads = mllm::worthwhile_threads(p.threads, 2.0 * p.rows * p.vocab * p.depth);
  // no block so large that a thread is left without one
  const int64_t share = ((p.vocab + threads - 1) / threads + SIDE - 1) / SIDE * SIDE;
  // pieces of long rows fall on few sets of the second cache: hold fewer, unless many panels need them
  const int64_t block_words = std::min<int64_t>(share, steps > STEPS && panels <= 2 ? 64 : 256);
  const int64_t blocks = (p.vocab + block_words - 1) / block_words;
  std::vector<mllm::Sums> sums(threads);
  std::atomic<int64_t> next{0};
  mllm::parallel(threads, [&](int t) {
    TileRegisters registers;
    sums[t].start(panels * SIDE);
    Words told(block_words);
    Halves split(block_words * std::min<int64_t>(steps, STEPS) * DEEP * parts);
    // products: two in turn, or those of all panels together, to be carried from one depth block to the next
    const int64_t pairs = block_words / SIDE;
    mllm::Floats x((steps <= STEPS ? 2 : std::min(panels, together) * pairs) * SIDE * SIDE);
    int64_t turn = 0;
    for (int64_t b = next++, following; b < blocks; b = following) {
      following = next++;
      const int64_t word = b * block_words, words = std::min(block_words, (p.vocab - word + SIDE - 1) / SIDE * SIDE);
      Pending done;
      for (int64_t first = 0; first < panels; first += together)
        for (int64_t step = 0; step < steps; step += STEPS) {
          const int64_t now = std::min<int64_t>(STEPS, steps - step), end = std::min(panels, first + together);
          const bool last = step + now == steps;
          split_words<T>(p, word, words, step, now, split.data());
          Ahead ahead;
          const int64_t then = !last || end < panels ? word : following * block_words;
          if (then < p.vocab && (steps > STEPS || end == panels)) {
            const int64_t column = last ? 0 : (step + STEPS) * DEEP;
            ahead.row = static_cast<const char*>(p.operand) + (then * p.depth + column) * sizeof(T);
            ahead.stride = p.depth * sizeof(T);
            ahead.bytes = std::min<int64_t>(STEPS * DEEP, p.depth - column) * sizeof(T);
            ahead.rows = std::min(block_words, p.vocab - then);
            ahead.turns = (end - first) * (words / SIDE) * now;
          }
          for (int64_t i = first; i < end; ++i) {
            if (last && (i == 0 || list[i].group != list[i - 1].group || !done.x)) {
              done.finish(p, told);
              told.fill(p, list[i].group, word, words);
            }
            const int vectors = (list[i].count + LANES - 1) / LANES;
            for (int64_t w = 0; w < words; w += SIDE) {
              float* here = x.data() + (steps <= STEPS ? turn++ % 2 : (i - first) * pairs + w / SIDE) * SIDE * SIDE;
              (vectors == 2 ? product<parts, 2> : product<parts, 1>)(
                  p, told, done, ahead, split.data() + w * now * DEEP * parts,
                  packed.data() + place(panels, i, step, steps), now, step > 0, here);
              if (last)
                done = {here, w, vectors, shifts.data() + i * SIDE, sums[t].peak.data() + i * SIDE,
                        sums[t].sum.data() + i * SIDE};
            }
          }
        }
      done.finish(p, told);
      sums[t].fold();
    }
  });
  mllm::merge(p, list, SIDE, sums);
}

static void log_sum_exp(const mllm::Problem& p) {
  p.operand_bfloat16 ? log_sum_exp<uint16_t>(p) : log_sum_exp<float>(p);
}

// The ceiling for the benchmarks: six tile products that never leave the registers count as one of float32.
static double fma_rate(int threads) {
  const long rounds = 1000000;
  std::atomic<int> waiting{threads};
  std::vector<double> seconds(threads);
  mllm::parallel(threads, [&](int t) {
    TileRegisters registers;
    for (--waiting; waiting > 0;) std::this_thread::yield();
    const auto start = std::chrono::steady_clock::now();
    for (long n = 0; n < rounds; ++n) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    seconds[t] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }, /*own=*/true);  // all must run at once
  return 4 * 2.0 * 16 * 16 * DEEP / 6 * rounds * threads / *std::max_element(seconds.begin(), seconds.end());
}
