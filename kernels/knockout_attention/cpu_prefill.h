// Prefill by fused multiply-adds. Included inside a namespace, once an instruction set, after cpu/lanes.h, with ROWS
// and VECS set so that ROWS * VECS accumulators and VECS operands fit the registers: no include guard.
//
// Keys lie in the lanes: a chunk of VECS * LANES keys is packed [depth][key] once a head. A block of ROWS rows meets
// one open chunk at a time, as far as its last row sees; its scores never leave the registers until they are weights,
// and the weights of neighbouring chunks meet their values together. Several row blocks share each visit to these
// chunks, which then come from the first or second cache.
//
// `Products` says what is packed and how it is multiplied; see cpu_singles.h, cpu_pairs.h.

constexpr int BLOCKS = 8;  // row blocks that meet chunks together

template <typename Products>
class Prefill {
  using T = typename Products::Given;
  using Unit = typename Products::Unit;

 public:
  Prefill(const mllm::AttentionProblem& problem, const mllm::Sight& seen, const mllm::Views& blocks_and_chunks)
      : p(problem),
        sight(seen),
        views(blocks_and_chunks),
        wide((p.width + LANES - 1) / LANES * LANES),
        depth((p.width + Products::PER - 1) / Products::PER),
        in_place(Products::VALUES_IN_PLACE && wide == p.width),
        keys(views.chunks * CHUNK * depth),
        values(in_place ? 0 : views.chunks * CHUNK / Products::PER * wide),
        queries(BLOCKS * ROWS * depth),
        weights(ROWS * HELD / Products::PER),
        out(BLOCKS * ROWS * wide),
        sums(BLOCKS * ROWS * LANES) {}

  void run(const mllm::AttentionTask& task) {
    pack_open_chunks(task);
    for (int64_t first = task.first; first < task.last; first += BLOCKS) {
      const int64_t count = std::min<int64_t>(BLOCKS, task.last - first);
      next_row = (first + BLOCKS) * ROWS;
      last_row = std::min(next_row + BLOCKS * ROWS, task.last * ROWS);
      for (int64_t b = 0; b < count; ++b) begin(b, task, first + b);
      for (int64_t c = 0; c < views.chunks; c += HELD / CHUNK)
        for (int64_t b = 0; b < count; ++b) meet(task, b, first + b, c, std::min(c + HELD / CHUNK, views.chunks));
      for (int64_t b = 0; b < count; ++b) finish(b, task);
    }
  }

 private:
  struct Block {
    int64_t head, row, count;
    mllm::Bits closed[ROWS], open;  // open: to some row
    float peak[ROWS];
  };
  using Units = std::vector<Unit, mllm::CacheAligned<Unit>>;

  const mllm::AttentionProblem& p;
  const mllm::Sight& sight;
  const mllm::Views& views;
  const int64_t wide, depth;
  const bool in_place;
  Units keys, values;      // [chunk][depth][CHUNK], [chunk][CHUNK / PER][wide]
  Units queries, weights;  // [block][ROWS][depth], [ROWS][HELD / PER]
  mllm::Floats out, sums;  // [block][ROWS][wide], [block][ROWS][LANES]
  Block blocks[BLOCKS];
  const Unit* value_base = nullptr;
  int64_t value_stride = 0;
  int64_t next_row = 0, last_row = 0;  // of those that fetch() has not asked for, counted block by block

  void pack_open_chunks(const mllm::AttentionTask& task) {
    const T* k = static_cast<const T*>(p.key) + task.batch * p.key_strides.batch + task.kv_head * p.key_strides.head;
    const T* v =
        static_cast<const T*>(p.value) + task.batch * p.value_strides.batch + task.kv_head * p.value_strides.head;
    value_base = in_place ? reinterpret_cast<const Unit*>(v) : values.data();
    value_stride = in_place ? p.value_strides.row : wide;
    for (int64_t c = 0; c < views.chunks; ++c) {
      bool open = false;
      for (int64_t b = task.first; b < task.last && !open; ++b) open = views.of(b, c) != mllm::View::NONE;
      if (!open) continue;
      const int64_t from = c * CHUNK, count = std::min<int64_t>(CHUNK, p.keys - from);
      Products::pack_keys(k + from * p.key_strides.row, p.key_strides.row, count, p.width,
                          keys.data() + c * CHUNK * depth);
      if (!in_place)
        Products::pack_values(v + from * p.value_strides.row, p.value_strides.row, count, p.width, wide,
                              values.data() + c * CHUNK / Products::PER * wide);
    }
  }

  // Asks for what the next blocks are the first to touch of one more row: its query, value and output. A row a chunk,
  // since the processor has room for a dozen such wishes. Always inlined: GCC drops calls of a function that does
  // nothing else.
  __attribute__((always_inline)) void fetch(const mllm::AttentionTask& task) {
    if (next_row >= last_row) return;
    const int64_t block = next_row / ROWS, row = block % views.blocks * ROWS + next_row % ROWS;
    ++next_row;
    if (row >= p.rows) return;
    const int64_t head = task.kv_head * p.group() + block / views.blocks;
    const T* q = static_cast<const T*>(p.query) + task.batch * p.query_strides.batch + head * p.query_strides.head +
                 row * p.query_strides.row;
    const T* to = static_cast<const T*>(p.out) + ((task.batch * p.rows + row) * p.heads + head) * p.width;
    const Unit* v = value_base + sight.position(row) * value_stride;
    for (int64_t e = 0; e < p.width; e += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(q + e, 0, 2);
      __builtin_prefetch(to + e, 1, 2);
      if (in_place) __builtin_prefetch(v + e, 0, 2);
    }
  }

  void begin(int64_t slot, const mllm::AttentionTask& task, int64_t index) {
    Block& b = blocks[slot];
    b.head = task.kv_head * p.group() + index / views.blocks;
    b.row = index % views.blocks * ROWS;
    b.count = std::min<int64_t>(ROWS, p.rows - b.row);
    b.open = 0;
    const T* q = static_cast<const T*>(p.query) + task.batch * p.query_strides.batch + b.head * p.query_strides.head;
    for (int r = 0; r < ROWS; ++r) {
      b.closed[r] = r < b.count ? sight.closed(b.row + r) : ~mllm::Bits(0);
      b.open |= ~b.closed[r];
      b.peak[r] = mllm::UNSET;
      Unit* to = queries.data() + (slot * ROWS + r) * depth;
      if (r < b.count) {
        Products::pack_query(q + (b.row + r) * p.query_strides.row, p.width, p.log2_scale(), to);
      } else {
        std::fill_n(to, depth, Unit(0));
      }
    }
    std::fill_n(out.data() + slot * ROWS * wide, ROWS * wide, 0.0f);
    std::fill_n(sums.data() + slot * ROWS * LANES, ROWS * LANES, 0.0f);
  }

  // One block and its open ones of chunks [chunk, stop), at most HELD / CHUNK: the weights of neighbours are held, so
  // that sums of values are loaded and stored once.
  void meet(const mllm::AttentionTask& task, int64_t slot, int64_t index, int64_t chunk, int64_t stop) {
    int64_t key = 0, held = 0;
    for (; chunk < stop; ++chunk) {
      const mllm::View view = views.of(index, chunk);
      if (view == mllm::View::NONE) continue;
      const int64_t from = chunk * CHUNK, seen = view == mllm::View::ALL ? CHUNK : until_last_seen(blocks[slot], from);
      if (!seen) continue;
      if (key + held != from) {
        add_values(slot, key, held);
        key = from, held = 0;
      }
      fetch(task);
      weigh(blocks[slot], slot, chunk, seen, view == mllm::View::SOME, held);
      held += seen;
    }
    add_values(slot, key, held);
  }

  // Keys of the chunk up to the last one that some row sees; those between that are not seen are masked.
  int64_t until_last_seen(const Block& b, int64_t from) const {
    int64_t to = std::min(from + CHUNK, sight.position(b.row + b.count - 1) + 1);
    while (to > from && !(sight.bit[to - 1] & b.open)) --to;
    return to - from;
  }

  // weights[held ..] = 2^(scores - peak) of one block and the first `seen` keys of a chunk.
  void weigh(Block& b, int64_t slot, int64_t chunk, int64_t seen, bool masked, int64_t held) {
    if (seen > 2 * LANES) return weigh_some<VECS>(b, slot, chunk, masked, held);
    if (seen > LANES) return weigh_some<2>(b, slot, chunk, masked, held);
    weigh_some<1>(b, slot, chunk, masked, held);
  }
  template <int NV>
  void weigh_some(Block& b, int64_t slot, int64_t chunk, bool masked, int64_t held) {
    if (p.softcap != 0) return weigh_vectors<NV, true>(b, slot, chunk, masked, held);
    weigh_vectors<NV, false>(b, slot, chunk, masked, held);
  }

  // Not inlined: its accumulators take all registers.
  template <int NV, bool CAPPED>
  __attribute__((noinline)) void weigh_vectors(Block& b, int64_t slot, int64_t chunk, bool masked, int64_t held) {
    vec x[ROWS][NV];
    Products::multiply(queries.data() + slot * ROWS * depth, keys.data() + chunk * CHUNK * depth, depth,
                       p.log2_scale(), x);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      ivec unseen[NV];
      if (CAPPED) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) x[r][j] = capped(x[r][j], p.log2_softcap());
      }
      if (masked) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          unseen[j] = hidden(sight, chunk * CHUNK + j * LANES, sight.position(b.row + r), b.closed[r]);
          x[r][j] = unseen[j] ? splat(mllm::UNSET) : x[r][j];
        }
      }
      vec most = x[r][0];
#pragma GCC unroll 4
      for (int j = 1; j < NV; ++j) most = maximum(most, x[r][j]);
      if (exceeds(most, splat(b.peak[r] + 8))) raise(b, slot, r, greatest(most), held);
      const vec peak = splat(b.peak[r] == mllm::UNSET ? 0.0f : b.peak[r]);
      float* sum = sums.data() + (slot * ROWS + r) * LANES;
      vec sum_here = load(sum);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        vec y = exp2(x[r][j] - peak);
        if (masked) y = unseen[j] ? (vec){} : y;
        sum_here += y;
        Products::keep_weights(y, weights.data() + (r * HELD + held + j * LANES) / Products::PER);
      }
      store(sum, sum_here);
    }
  }

  // By a whole number but for the first time: what there is already is halved so many times, exactly.
  __attribute__((noinline)) void raise(Block& b, int64_t slot, int r, float top, int64_t held) {
    if (b.peak[r] == mllm::UNSET) {
      b.peak[r] = top;
      return;
    }
    const float steps = std::ceil(top - b.peak[r]), down = std::exp2(-steps);
    b.peak[r] += steps;
    float* o = out.data() + (slot * ROWS + r) * wide;
    for (int64_t e = 0; e < wide; e += LANES) store(o + e, load(o + e) * down);
    float* sum = sums.data() + (slot * ROWS + r) * LANES;
    store(sum, load(sum) * down);
    Products::scale_weights(weights.data() + r * HELD / Products::PER, held, down);
  }

  template <int NV>
  __attribute__((noinline)) void add_strip(const Unit* v, int64_t count, float* o) {
    vec sum[ROWS][NV];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[r][j] = load(o + r * wide + j * LANES);
    Products::add(weights.data(), v, value_stride, count, sum);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) store(o + r * wide + j * LANES, sum[r][j]);
  }

  // Adds the values of the keys from `key` whose weights are held.
  void add_values(int64_t slot, int64_t key, int64_t held) {
    const int64_t count = (held + Products::PER - 1) / Products::PER, strips = wide / LANES;
    if (!count) return;
    const Unit* v = value_base + key / Products::PER * value_stride;
    float* o = out.data() + slot * ROWS * wide;
    int64_t strip = 0;
    for (; strip + VECS <= strips; strip += VECS) add_strip<VECS>(v + strip * LANES, count, o + strip * LANES);
    if (strips - strip == 2) return add_strip<2>(v + strip * LANES, count, o + strip * LANES);
    if (strips - strip == 1) add_strip<1>(v + strip * LANES, count, o + strip * LANES);
  }

  void finish(int64_t slot, const mllm::AttentionTask& task) {
    const Block& b = blocks[slot];
    for (int64_t r = 0; r < b.count; ++r) {
      const float sum = total(load(sums.data() + (slot * ROWS + r) * LANES));
      write_row<T>(p, task.batch, b.head, b.row + r, out.data() + (slot * ROWS + r) * wide, sum, b.peak[r]);
    }
  }
};

template <typename Products>
static void prefill(const mllm::AttentionProblem& p) {
  mllm::run_prefill<Prefill<Products>>(p, ROWS, CHUNK, [](auto) { return 0; });
}
