// Prefill on matrix tiles (AMX). Included inside a namespace, with LANES 16, after cpu/tiles.h: no include guard.
//
// A block of 32 rows meets up to four open chunks of 32 keys at a time, wherever these lie: an item. Tiles and vector
// units work side by side: while the tiles make the scores of one item, the vectors weigh those of the item before it;
// while the tiles add values, the vectors do small jobs: the outputs of the row blocks before, and the parts of the
// queries, keys and values of those that come. Several row blocks share each visit to the keys.

constexpr int64_t SECOND_CACHE = 3 << 19;  // bytes of it for keys and values, where it has 2 MiB
constexpr int CHUNK = SIDE;  // keys
constexpr int TURN = 4;      // chunks of an item
constexpr int BLOCKS = 4;      // row blocks that meet the chunks together, at most

// Transposes 16 rows of 16 words of 32 bits.
static inline void transpose(vec (&x)[16]) {
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps((__m512)x[2 * i], (__m512)x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps((__m512)x[2 * i], (__m512)x[2 * i + 1]);
  }
  __m512 u[16];
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = (__m512)_mm512_unpacklo_pd((__m512d)t[4 * i], (__m512d)t[4 * i + 2]);
    u[4 * i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[4 * i], (__m512d)t[4 * i + 2]);
    u[4 * i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)t[4 * i + 1], (__m512d)t[4 * i + 3]);
    u[4 * i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)t[4 * i + 1], (__m512d)t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    x[i] = (vec)_mm512_shuffle_f32x4(a, c, 0x88);
    x[4 + i] = (vec)_mm512_shuffle_f32x4(b, d, 0x88);
    x[8 + i] = (vec)_mm512_shuffle_f32x4(a, c, 0xdd);
    x[12 + i] = (vec)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// Half of one tile of each part of values, from row `first` on: a row is 16 columns of one pair of keys.
template <typename T>
static inline void split_values(const T* from, int64_t stride, int first, uint16_t* to, int64_t part) {
  for (int i = first; i < first + 8; ++i) {
    const vec low = load(from + i * stride), high = load(from + (i + 16) * stride);
    if (sizeof(T) == 4) {
      split_pairs(low, high, to + i * DEEP, part);
    } else {
      store_pairs(to + i * DEEP, (bits)low, (bits)high);
    }
  }
}

// One tile of each part of keys, in stages small enough to run beside the tiles: a row is one pair of depths of 16 keys.
struct KeySplitter {
  template <typename T>
  static constexpr int stages = sizeof(T) == 4 ? 4 : 2;
  vec low[16], high[16];

  void run(const float* from, int64_t stride, int stage, uint16_t* to, int64_t part) {
    if (stage < 2) {
      vec(&x)[16] = stage ? high : low;
      for (int i = 0; i < 16; ++i) x[i] = load(from + i * stride + 16 * stage);
      transpose(x);
    } else {
      for (int i = 8 * (stage - 2); i < 8 * (stage - 1); ++i) split_pairs(low[i], high[i], to + i * DEEP, part);
    }
  }
  void run(const uint16_t* from, int64_t stride, int stage, uint16_t* to, int64_t) {
    if (stage == 0) {
      for (int i = 0; i < 16; ++i) {
        alignas(64) uint16_t row[DEEP];
        split(from + i * stride, row, 0);
        low[i] = load(reinterpret_cast<const float*>(row));
      }
    } else {
      transpose(low);
      for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(to + i * DEEP), low[i]);
    }
  }
};

template <typename T>
class Prefill {
 public:
  static constexpr int P = sizeof(T) == 4 ? PARTS : 1;
  static constexpr int64_t step = P * 2 * TILE;

  Prefill(const mllm::AttentionProblem& problem, const mllm::Sight& seen, const mllm::Views& blocks_and_chunks)
      : p(problem),
        sight(seen),
        views(blocks_and_chunks),
        steps((p.width + DEEP - 1) / DEEP),
        piece(steps * step),
        together(views.chunks * piece * 4 <= SECOND_CACHE ? 2 : BLOCKS),
        keys(views.chunks * piece),
        values(views.chunks * piece),
        queries(3 * BLOCKS * piece),
        weights(TURN * step),
        scores(2 * SIDE * TURN * CHUNK),
        out(3 * BLOCKS * SIDE * steps * DEEP),
        sums(3 * BLOCKS * SIDE * LANES) {}

  void run(const mllm::AttentionTask& t) {
    task = t;
    key = static_cast<const T*>(p.key) + task.batch * p.key_strides.batch + task.kv_head * p.key_strides.head;
    value = static_cast<const T*>(p.value) + task.batch * p.value_strides.batch + task.kv_head * p.value_strides.head;
    ready.assign(views.chunks, false);
    std::vector<Item> items, next;
    prepare(task.first, 0, next);
    drain();
    int set = 0;
    for (int64_t first = task.first; first < task.last; first += together, set = (set + 1) % 3) {
      items.swap(next);
      if (first + together < task.last) prepare(first + together, (set + 1) % 3, next);
      run(items);
      drain();
      for (int b = set * BLOCKS; b < set * BLOCKS + std::min(together, task.last - first); ++b)
        for (int64_t r = 0; r < blocks[b].count; r += 4) jobs.push_back({FINISH, b, r, 0, 0});
    }
    drain();
  }

 private:
  enum Kind { SPLIT_KEYS, SPLIT_VALUES, SPLIT_QUERIES, FINISH };
  struct Job {
    Kind kind;
    int64_t index;  // chunk or row block
    int64_t s;      // step in depth; of FINISH the first row
    int half, part;
  };
  struct Item {
    int block = 0, count = 0;  // chunks
    bool masked = false;
    int64_t chunk[TURN] = {};
  };
  struct Block {
    int64_t head, row, count;
    bool empty;  // nothing in `out` yet
    mllm::Bits closed[SIDE];
    float peak[SIDE];
  };

  const mllm::AttentionProblem& p;
  const mllm::Sight& sight;
  const mllm::Views& views;
  const int64_t steps, piece;
  const int64_t together;  // two blocks stay in the first cache; four spare the third, where keys and values lie there
  Halves keys, values, queries, weights;  // [chunk or block][step in depth][part][half][TILE]
  mllm::Floats scores, out, sums;         // [2][32][4 * 32], [block][32][steps * 32], [block][32][LANES]
  std::vector<T, mllm::CacheAligned<T>> ragged;  // of an edge: what is split, with zeros beside it
  mllm::AttentionTask task{};
  const T *key = nullptr, *value = nullptr;
  std::vector<bool> ready;   // chunks that are split, or about to be
  Block blocks[3 * BLOCKS];  // three sets: those that run, those before them and those after
  std::vector<Job> jobs;
  size_t next_job = 0;
  KeySplitter splitter;
  int64_t owed = 0, hooks = 1;  // jobs are spread over the hooks of one run
  // the item that is being weighed, its next row, and how the rows are spread over the tile products
  const Item* pending = nullptr;
  const float* pending_scores = nullptr;
  int next_row = 0, credit = 0, products = 1;

  // Plans the items of some row blocks and the jobs that come before. Turn by turn: chunks are met by all blocks
  // while they are near.
  void prepare(int64_t first, int set, std::vector<Item>& items) {
    const int64_t count = std::min(together, task.last - first);
    for (int b = 0; b < count; ++b) begin(set * BLOCKS + b, first + b);
    std::vector<int64_t> open;
    for (int64_t c = 0; c < views.chunks; ++c)
      for (int64_t b = 0; b < count; ++b)
        if (views.of(first + b, c) != mllm::View::NONE) {
          open.push_back(c);
          break;
        }
    items.clear();
    for (size_t at = 0; at < open.size(); at += TURN)
      for (int b = 0; b < count; ++b) {
        Item item;
        item.block = set * BLOCKS + b;
        for (size_t i = at; i < std::min(at + TURN, open.size()); ++i) {
          const mllm::View view = views.of(first + b, open[i]);
          if (view == mllm::View::NONE) continue;
          item.masked |= view == mllm::View::SOME;
          item.chunk[item.count++] = open[i];
        }
        if (item.count) items.push_back(item);
      }
    for (const int64_t c : open) {
      if (ready[c]) continue;
      ready[c] = true;
      for (int64_t s = 0; s < steps; ++s)
        for (int half = 0; half < 2; ++half) {
          for (int part = 0; part < KeySplitter::stages<T>; ++part) jobs.push_back({SPLIT_KEYS, c, s, half, part});
          for (int part = 0; part < 2; ++part) jobs.push_back({SPLIT_VALUES, c, s, half, part});
        }
    }
  }

  void begin(int slot, int64_t index) {
    Block& b = blocks[slot];
    b.head = task.kv_head * p.group() + index / views.blocks;
    b.row = index % views.blocks * SIDE;
    b.count = std::min<int64_t>(SIDE, p.rows - b.row);
    b.empty = true;
    for (int r = 0; r < SIDE; ++r) {
      b.closed[r] = r < b.count ? sight.closed(b.row + r) : ~mllm::Bits(0);
      b.peak[r] = mllm::UNSET;
    }
    std::fill_n(sums.data() + slot * SIDE * LANES, SIDE * LANES, 0.0f);
    for (int64_t s = 0; s < steps; ++s)
      for (int half = 0; half < 2; ++half) jobs.push_back({SPLIT_QUERIES, slot, s, half, 0});
  }

  void run(const std::vector<Item>& items) {
    int64_t chunks = 0;
    for (const Item& item : items) chunks += item.count;
    hooks = std::max<int64_t>(1, chunks * steps * (P == 3 ? 6 : 1));
    const int64_t todo = jobs.size();
    owed = 0;
    for (size_t i = 0; i <= items.size(); ++i) {
      float* here = scores.data() + i % 2 * SIDE * TURN * CHUNK;
      if (i < items.size()) score(items[i], here);
      while (pending) advance();
      if (i > 0) add_values(items[i - 1], todo);
      if (i < items.size()) pending = &items[i], pending_scores = here, next_row = credit = 0;
    }
  }

  // The raw scores of an item; meanwhile the item before it is weighed.
  void score(const Item& item, float* to) {
    settle();
    products = static_cast<int>(item.count * steps * (P == 3 ? 6 : 1));
    for (int j = 0; j < item.count; ++j) {
      zero_product();
      const uint16_t *q = queries.data() + item.block * piece, *k = keys.data() + item.chunk[j] * piece;
      load_first<P, 2>(q, k);
      for (int64_t s = 0; s < steps; ++s, q += step, k += step) {
        const int64_t ahead = s + 1 < steps ? step : 0;
        multiply<P, P, 2>(q, k, q + ahead, k + ahead, [&] {
          if (!pending) return;
          for (credit += SIDE; pending && credit >= products; credit -= products) advance();
        });
      }
      store_product(to + j * CHUNK, TURN * CHUNK);
    }
    settle();
  }

  // out += weights . values of an item; meanwhile the jobs.
  void add_values(const Item& item, int64_t todo) {
    settle();
    Block& b = blocks[item.block];
    const int64_t stride = steps * DEEP;
    for (int64_t s = 0; s < steps; ++s) {
      float* to = out.data() + item.block * SIDE * stride + s * DEEP;
      b.empty ? zero_product() : load_product(to, stride);
      const uint16_t *w = weights.data(), *v = values.data() + s * step;
      load_first<P, 2>(w, v + item.chunk[0] * piece);
      for (int j = 0; j < item.count; ++j) {
        const int next = std::min(j + 1, item.count - 1);
        multiply<P, P, 2>(w + j * step, v + item.chunk[j] * piece, w + next * step, v + item.chunk[next] * piece, [&] {
          for (owed += todo; owed >= hooks && next_job < jobs.size(); owed -= hooks) do_job(jobs[next_job++]);
        });
      }
      store_product(to, stride);
    }
    b.empty = false;
    settle();
  }

  void advance() {
    p.softcap != 0 ? weigh_chunks<true>() : weigh_chunks<false>();
    if (++next_row == SIDE) pending = nullptr;
  }

  template <bool CAPPED>
  void weigh_chunks() {
    switch (pending->count) {
      case 1: return weigh<1, CAPPED>(*pending, next_row);
      case 2: return weigh<2, CAPPED>(*pending, next_row);
      case 3: return weigh<3, CAPPED>(*pending, next_row);
      default: return weigh<TURN, CAPPED>(*pending, next_row);
    }
  }

  // One row's scores of an item to weights 2^(score - peak), in parts.
  template <int N, bool CAPPED>
  __attribute__((noinline)) void weigh(const Item& item, int r) {
    Block& b = blocks[item.block];
    const float factor = CAPPED ? 1.0f : p.log2_scale();
    const float* from = pending_scores + r * TURN * CHUNK;
    vec x[2 * N];
#pragma GCC unroll 8
    for (int j = 0; j < 2 * N; ++j) x[j] = load(from + j * LANES);
    if (CAPPED) {
#pragma GCC unroll 8
      for (int j = 0; j < 2 * N; ++j) x[j] = capped(x[j] * p.log2_scale(), p.log2_softcap());
    }
    if (item.masked) {
      const int64_t position = sight.position(b.row + r);
#pragma GCC unroll 8
      for (int j = 0; j < 2 * N; ++j) {
        const ivec out_of_sight = hidden(sight, item.chunk[j / 2] * CHUNK + j % 2 * 16, position, b.closed[r]);
        x[j] = out_of_sight ? splat(mllm::UNSET) : x[j];
      }
    }
    vec most = x[0];
#pragma GCC unroll 8
    for (int j = 1; j < 2 * N; ++j) most = maximum(most, x[j]);
    const float top = greatest(most) * factor;
    if (top != mllm::UNSET && top > b.peak[r] + 8) raise(item.block, r, top);
    const vec peak = splat(b.peak[r] == mllm::UNSET ? 0.0f : b.peak[r]);  // all weights are 0 then
#pragma GCC unroll 8
    for (int j = 0; j < 2 * N; ++j) x[j] = exp2(x[j] * factor - peak);
    float* sum = sums.data() + (item.block * SIDE + r) * LANES;
    vec sum_here = load(sum);
#pragma GCC unroll 8
    for (int j = 0; j < 2 * N; ++j) sum_here += x[j];
    store(sum, sum_here);
    uint16_t* to = weights.data() + r / 16 * TILE + r % 16 * DEEP;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j, to += step) {
      if (P == PARTS) {
        split_pairs(x[2 * j], x[2 * j + 1], to, 2 * TILE);
      } else {
        store_pairs(to, nearest_bfloat16(x[2 * j]), nearest_bfloat16(x[2 * j + 1]));
      }
    }
  }

  __attribute__((noinline)) void raise(int block, int r, float top) {
    Block& b = blocks[block];
    if (b.peak[r] != mllm::UNSET) {
      const vec down = splat(std::exp2(b.peak[r] - top));
      float* o = out.data() + (block * SIDE + r) * steps * DEEP;
      for (int64_t e = 0; e < steps * DEEP; e += LANES) store(o + e, load(o + e) * down);
      float* sum = sums.data() + (block * SIDE + r) * LANES;
      store(sum, load(sum) * down);
    }
    b.peak[r] = top;
  }

  void drain() {
    while (next_job < jobs.size()) do_job(jobs[next_job++]);
    jobs.clear();
    next_job = 0;
  }

  // Brings what the next chunk's, or row block's, jobs will touch nearer: sources lie in the last cache at best.
  template <int WRITE = 0, typename U>
  static void prefetch(const U* from, int64_t stride, int64_t rows, int64_t values) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t e = 0; e < values; e += 64 / static_cast<int64_t>(sizeof(U)))
        __builtin_prefetch(from + i * stride + e, WRITE, 2);
  }

  __attribute__((noinline)) void do_job(const Job& job) {
    const int64_t at = (job.s * P * 2 + job.half) * TILE, first = job.index * CHUNK;
    const int64_t row_stride = job.kind == SPLIT_KEYS ? p.key_strides.row : p.value_strides.row;
    switch (job.kind) {
      case SPLIT_KEYS: {
        const auto [from, stride] = padded(key, row_stride, first + job.half * 16, p.keys, 16, job.s * DEEP, DEEP);
        if (first + 2 * CHUNK <= p.keys) {
          const int64_t rows = 16 / KeySplitter::stages<T>, row = first + CHUNK + job.half * 16 + job.part * rows;
          prefetch(key + row * row_stride + job.s * DEEP, row_stride, rows, DEEP);
        }
        splitter.run(from, stride, job.part, keys.data() + job.index * piece + at, 2 * TILE);
        break;
      }
      case SPLIT_VALUES: {
        const auto [from, stride] = padded(value, row_stride, first, p.keys, 32, job.s * DEEP + job.half * 16, 16);
        if (first + 2 * CHUNK <= p.keys)
          prefetch(value + (first + CHUNK + job.part * 16) * row_stride + job.s * DEEP + job.half * 16, row_stride, 16, 16);
        split_values(from, stride, 8 * job.part, values.data() + job.index * piece + at, 2 * TILE);
        break;
      }
      case SPLIT_QUERIES: {
        const Block& b = blocks[job.index];
        const T* q = static_cast<const T*>(p.query) + task.batch * p.query_strides.batch + b.head * p.query_strides.head;
        const int64_t row = b.row + job.half * 16;
        const auto [from, stride] = padded(q, p.query_strides.row, row, p.rows, 16, job.s * DEEP, DEEP);
        if (row + SIDE + 16 <= p.rows)
          prefetch(q + (row + SIDE) * p.query_strides.row + job.s * DEEP, p.query_strides.row, 16, DEEP);
        uint16_t* to = queries.data() + job.index * piece + at;
        for (int i = 0; i < 16; ++i) split(from + i * stride, to + i * DEEP, 2 * TILE);
        break;
      }
      case FINISH: finish(job.index, job.s);
    }
  }

  // Where `rows` rows from `row` on and `columns` columns lie, and their stride: copied, with zeros beyond the last row
  // and column, if they reach over the edge.
  std::pair<const T*, int64_t> padded(const T* from, int64_t stride, int64_t row, int64_t end, int64_t rows,
                                      int64_t column, int64_t columns) {
    if (row + rows <= end && column + columns <= p.width) return {from + row * stride + column, stride};
    ragged.assign(rows * columns, T(0));
    for (int64_t i = 0; i < std::min(rows, end - row); ++i)
      for (int64_t e = 0; e < std::min(columns, p.width - column); ++e)
        ragged[i * columns + e] = from[(row + i) * stride + column + e];
    return {ragged.data(), columns};
  }

  void finish(int64_t slot, int64_t from) {
    const Block& b = blocks[slot];
    for (int64_t r = from; r < std::min(from + 4, b.count); ++r) {
      const float sum = total(load(sums.data() + (slot * SIDE + r) * LANES));
      const float* row = out.data() + (slot * SIDE + r) * steps * DEEP;
      write_row<T>(p, task.batch, b.head, b.row + r, row, sum, b.peak[r]);
    }
  }
};

template <typename T>
static void prefill(const mllm::AttentionProblem& p) {
  mllm::run_prefill<Prefill<T>>(p, SIDE, CHUNK, [](int) { return TileRegisters(); });
}
