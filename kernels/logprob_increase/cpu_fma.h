// The path of fused multiply-adds. Included inside a namespace, once an instruction set, with LANES, ROWS
// and VECS set so that ROWS * VECS accumulators and VECS operands fit the registers: no include guard.
//
// Positions lie in the lanes and words are broadcast, so the operand is read as it is stored, and the sum
// over words is a vertical one. A block of words (up to 512 KiB, for the second cache) meets every panel of
// positions (24 KiB at a depth of 128, for the first).

constexpr int WIDTH = VECS * LANES;
constexpr int DEPTH_BLOCK = 128;

template <int NV>
static inline void multiply(const float* m, int64_t stride, const float* u, int depth, vec (&c)[ROWS][NV]) {
  for (int from = 0; from < depth; from += 16) {
    // the rows that come next, a cache line of each
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(m + (ROWS + r) * stride + from, 0, 3);
    const int to = from + 16 < depth ? from + 16 : depth;
#pragma GCC unroll 2
    for (int k = from; k < to; ++k) {
      vec x[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[j] = load(u + (k * NV + j) * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const vec w = splat(m[r * stride + k]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) c[r][j] += w * x[j];
      }
    }
  }
}

// One panel against a block of words laid out [depth block][word][DEPTH_BLOCK]; `partial` carries sums
// from one depth block to the next.
template <int NV>
static void panel_against_block(const mllm::Problem& p, const float* block, int64_t block_words, int64_t stride,
                                const Words& words, const float* u, const float* shift, float* partial, float* peak,
                                float* sum) {
  const int64_t blocks = (p.depth + DEPTH_BLOCK - 1) / DEPTH_BLOCK;
  for (int64_t b = 0; b < blocks; ++b) {
    const int depth = static_cast<int>(std::min<int64_t>(DEPTH_BLOCK, p.depth - b * DEPTH_BLOCK));
    for (int64_t w = 0; w < block_words; w += ROWS) {
      vec c[ROWS][NV];
      // the peak may move from one word to the next: what hangs on it joins with the last block
      if (b + 1 == blocks) {
        begin<ROWS, NV>(c, p, words, w, shift, peak);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) c[r][j] = (vec){};
      }
      if (b > 0) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) c[r][j] += load(partial + ((w + r) * NV + j) * LANES);
      }
      multiply<NV>(block + (b * block_words + w) * stride, stride, u + b * DEPTH_BLOCK * NV * LANES, depth, c);
      if (b + 1 == blocks) {
        absorb<ROWS, NV>(c, p, words, w, peak, sum);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) store(partial + ((w + r) * NV + j) * LANES, c[r][j]);
      }
    }
  }
}

static void copy_words(const mllm::Problem& p, int64_t word, int64_t count, int64_t stride, float* block) {
  const int64_t blocks = (p.depth + DEPTH_BLOCK - 1) / DEPTH_BLOCK;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t w = 0; w < count; ++w) {
      float* to = block + (b * count + w) * stride;
      const int64_t start = b * DEPTH_BLOCK, depth = std::min<int64_t>(DEPTH_BLOCK, p.depth - start);
      const int64_t from = (word + w) * p.depth + start;
      if (word + w >= p.vocab) {
        std::memset(to, 0, sizeof(float) * depth);
      } else if (p.operand_bfloat16) {
        const uint16_t* source = static_cast<const uint16_t*>(p.operand) + from;
        uint32_t* bits = reinterpret_cast<uint32_t*>(to);
        for (int64_t k = 0; k < depth; ++k) bits[k] = static_cast<uint32_t>(source[k]) << 16;
      } else {
        std::memcpy(to, static_cast<const float*>(p.operand) + from, sizeof(float) * depth);
      }
    }
}

static void log_sum_exp(const mllm::Problem& p) {
  const std::vector<mllm::Panel> list = mllm::panels(p, WIDTH);
  const int64_t panels = list.size();
  auto vectors = [&](int64_t i) { return (list[i].count + LANES - 1) / LANES; };
  // writes packed [panel][depth][lanes of the panel], zeros beside the last row
  mllm::Floats packed(panels * p.depth * WIDTH, 0.0f), shifts(panels * WIDTH, 0.0f);
  for (int64_t i = 0; i < panels; ++i) {
    float* u = packed.data() + i * p.depth * WIDTH;
    const int lanes = vectors(i) * LANES;
    for (int n = 0; n < list[i].count; ++n) {
      const float* from = p.writes + (list[i].row + n) * p.depth;
      for (int64_t k = 0; k < p.depth; ++k) u[k * lanes + n] = from[k];
      if (p.shift) shifts[i * WIDTH + n] = p.shift[list[i].row + n];
    }
  }
  int64_t block_words = std::clamp<int64_t>(131072 / p.depth, ROWS, 512) / ROWS * ROWS;
  const int threads = mllm::worthwhile_threads(p.threads, 2.0 * p.rows * p.vocab * p.depth);
  // no block so large that a thread is left without one
  block_words = std::min(block_words, ((p.vocab + threads - 1) / threads + ROWS - 1) / ROWS * ROWS);
  const int64_t blocks = (p.vocab + block_words - 1) / block_words;
  const bool in_place = !p.operand_bfloat16 && p.depth <= DEPTH_BLOCK;
  std::vector<mllm::Sums> sums(threads);
  std::atomic<int64_t> next{0};
  mllm::parallel(threads, [&](int t) {
    sums[t].start(panels * WIDTH);
    Words told(block_words);
    mllm::Floats copy, partial(p.depth > DEPTH_BLOCK ? block_words * WIDTH : 0);
    for (int64_t b; (b = next++) < blocks;) {
      const int64_t word = b * block_words;
      const int64_t words = std::min(block_words, (p.vocab - word + ROWS - 1) / ROWS * ROWS);
      const float* block = static_cast<const float*>(p.operand) + word * p.depth;
      int64_t stride = p.depth;
      if (!in_place || word + words > p.vocab) {
        stride = std::min<int64_t>(p.depth, DEPTH_BLOCK);
        copy.resize(words * ((p.depth + DEPTH_BLOCK - 1) / DEPTH_BLOCK) * stride);
        copy_words(p, word, words, stride, copy.data());
        block = copy.data();
      }
      for (int64_t i = 0; i < panels; ++i) {
        if (i == 0 || list[i].group != list[i - 1].group) told.fill(p, list[i].group, word, words);
        const float *u = packed.data() + i * p.depth * WIDTH, *shift = shifts.data() + i * WIDTH;
        float *peak = sums[t].peak.data() + i * WIDTH, *sum = sums[t].sum.data() + i * WIDTH;
        auto run = vectors(i) == 1   ? panel_against_block<1>
                   : vectors(i) == 2 ? panel_against_block<2>
                                     : panel_against_block<VECS>;
        run(p, block, words, stride, told, u, shift, partial.data(), peak, sum);
      }
      sums[t].fold();
    }
  });
  mllm::merge(p, list, WIDTH, sums);
}
