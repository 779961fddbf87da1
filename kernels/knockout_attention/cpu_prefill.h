// Prefill by fused multiply-adds. Included inside a namespace, once an instruction set, after cpu/vector.h, with ROWS
// and VECS set so that ROWS * VECS accumulators and VECS operands fit the registers: no include guard.
//
// Keys lie in the lanes: a chunk of VECS * LANES keys is packed [depth][key] once a head. A block of ROWS rows meets
// one open chunk at a time; its scores never leave the registers until they are weights. Several row blocks share each
// visit to a chunk, which then comes from the first or second cache.

constexpr int CHUNK = VECS * LANES;
constexpr int BLOCKS = 8;  // row blocks that meet a chunk together

template <typename T>
class Prefill {
 public:
  Prefill(const mllm::AttentionProblem& problem, const mllm::Sight& seen, const mllm::Views& blocks_and_chunks)
      : p(problem),
        sight(seen),
        views(blocks_and_chunks),
        wide((p.width + LANES - 1) / LANES * LANES),
        in_place(sizeof(T) == 4 && wide == p.width),
        keys(views.chunks * CHUNK * p.width),
        values(in_place ? 0 : views.chunks * CHUNK * wide),
        queries(BLOCKS * ROWS * p.width),
        weights(ROWS * CHUNK),
        out(BLOCKS * ROWS * wide),
        sums(BLOCKS * ROWS * LANES) {}

  void run(const mllm::AttentionTask& task) {
    pack_open_chunks(task);
    for (int64_t first = task.first; first < task.last; first += BLOCKS) {
      const int64_t count = std::min<int64_t>(BLOCKS, task.last - first);
      for (int64_t b = 0; b < count; ++b) begin(b, task, first + b);
      for (int64_t c = 0; c < views.chunks; ++c)
        for (int64_t b = 0; b < count; ++b) {
          const mllm::View view = views.of(first + b, c);
          if (view == mllm::View::NONE) continue;
          weigh(blocks[b], b, c, view == mllm::View::SOME);
          add_values(b, c);
        }
      for (int64_t b = 0; b < count; ++b) finish(b, task);
    }
  }

 private:
  struct Block {
    int64_t head, row, count;
    mllm::Bits closed[ROWS];
    float peak[ROWS];
  };

  const mllm::AttentionProblem& p;
  const mllm::Sight& sight;
  const mllm::Views& views;
  const int64_t wide;
  const bool in_place;
  mllm::Floats keys, values;   // [chunk][depth][CHUNK], [chunk][CHUNK][wide]
  mllm::Floats queries;        // [block][ROWS][depth]
  mllm::Floats weights, out, sums;  // [ROWS][CHUNK], [block][ROWS][wide], [block][ROWS][LANES]
  Block blocks[BLOCKS];
  const float* value_base = nullptr;
  int64_t value_stride = 0;

  void pack_open_chunks(const mllm::AttentionTask& task) {
    const T* k = static_cast<const T*>(p.key) + task.batch * p.key_strides.batch + task.kv_head * p.key_strides.head;
    const T* v =
        static_cast<const T*>(p.value) + task.batch * p.value_strides.batch + task.kv_head * p.value_strides.head;
    value_base = in_place ? reinterpret_cast<const float*>(v) : values.data();
    value_stride = in_place ? p.value_strides.row : wide;
    for (int64_t c = 0; c < views.chunks; ++c) {
      bool open = false;
      for (int64_t b = task.first; b < task.last && !open; ++b) open = views.of(b, c) != mllm::View::NONE;
      if (!open) continue;
      const int64_t from = c * CHUNK, count = std::min<int64_t>(CHUNK, p.keys - from);
      pack_keys(k + from * p.key_strides.row, p.key_strides.row, count, p.width, keys.data() + c * CHUNK * p.width);
      if (in_place) continue;
      for (int64_t i = 0; i < count; ++i) {
        float* to = values.data() + (from + i) * wide;
        const T* row = v + (from + i) * p.value_strides.row;
        for (int64_t e = 0; e < p.width; ++e) to[e] = widen(row[e]);
        std::fill(to + p.width, to + wide, 0.0f);
      }
    }
  }

  void begin(int64_t slot, const mllm::AttentionTask& task, int64_t index) {
    Block& b = blocks[slot];
    b.head = task.kv_head * p.group() + index / views.blocks;
    b.row = index % views.blocks * ROWS;
    b.count = std::min<int64_t>(ROWS, p.rows - b.row);
    const T* q = static_cast<const T*>(p.query) + task.batch * p.query_strides.batch + b.head * p.query_strides.head;
    for (int r = 0; r < ROWS; ++r) {
      b.closed[r] = r < b.count ? sight.closed(b.row + r) : ~mllm::Bits(0);
      b.peak[r] = mllm::UNSET;
      float* to = queries.data() + (slot * ROWS + r) * p.width;
      if (r < b.count) {
        const T* row = q + (b.row + r) * p.query_strides.row;
        for (int64_t e = 0; e < p.width; ++e) to[e] = widen(row[e]) * p.log2_scale();
      } else {
        std::fill_n(to, p.width, 0.0f);
      }
    }
    std::fill_n(out.data() + slot * ROWS * wide, ROWS * wide, 0.0f);
    std::fill_n(sums.data() + slot * ROWS * LANES, ROWS * LANES, 0.0f);
  }

  // weights = 2^(scores - peak) of one block and chunk.
  void weigh(Block& b, int64_t slot, int64_t chunk, bool masked) {
    vec x[ROWS][VECS];
    multiply_keys(queries.data() + slot * ROWS * p.width, keys.data() + chunk * CHUNK * p.width, p.width, x);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      ivec unseen[VECS];
      if (masked) {
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) {
          unseen[j] = hidden(sight, chunk * CHUNK + j * LANES, sight.position(b.row + r), b.closed[r]);
          x[r][j] = unseen[j] ? splat(mllm::UNSET) : x[r][j];
        }
      }
      vec most = x[r][0];
#pragma GCC unroll 4
      for (int j = 1; j < VECS; ++j) most = maximum(most, x[r][j]);
      const float top = greatest(most);
      if (top != mllm::UNSET && top > b.peak[r] + 8) raise(b, slot, r, top);
      const vec peak = splat(b.peak[r] == mllm::UNSET ? 0.0f : b.peak[r]);
      float* sum = sums.data() + (slot * ROWS + r) * LANES;
      vec sum_here = load(sum);
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) {
        vec y = exp2(x[r][j] - peak);
        if (masked) y = unseen[j] ? (vec){} : y;
        sum_here += y;
        store(weights.data() + r * CHUNK + j * LANES, y);
      }
      store(sum, sum_here);
    }
  }

  __attribute__((noinline)) void raise(Block& b, int64_t slot, int r, float top) {
    if (b.peak[r] != mllm::UNSET) {
      const vec down = splat(std::exp2(b.peak[r] - top));
      float* o = out.data() + (slot * ROWS + r) * wide;
      for (int64_t e = 0; e < wide; e += LANES) store(o + e, load(o + e) * down);
      float* sum = sums.data() + (slot * ROWS + r) * LANES;
      store(sum, load(sum) * down);
    }
    b.peak[r] = top;
  }

  template <int NV>
  void add_strip(const float* v, int64_t stride, int64_t count, float* o) {
    vec sum[ROWS][NV];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[r][j] = load(o + r * wide + j * LANES);
    for (int64_t k = 0; k < count; ++k) {
      vec x[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[j] = load(v + k * stride + j * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const vec w = splat(weights[r * CHUNK + k]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[r][j] += w * x[j];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) store(o + r * wide + j * LANES, sum[r][j]);
  }

  void add_values(int64_t slot, int64_t chunk) {
    const int64_t count = std::min<int64_t>(CHUNK, p.keys - chunk * CHUNK), strips = wide / LANES;
    const float* v = value_base + chunk * CHUNK * value_stride;
    float* o = out.data() + slot * ROWS * wide;
    int64_t strip = 0;
    for (; strip + VECS <= strips; strip += VECS) add_strip<VECS>(v + strip * LANES, value_stride, count, o + strip * LANES);
    if (strips - strip == 2) return add_strip<2>(v + strip * LANES, value_stride, count, o + strip * LANES);
    if (strips - strip == 1) add_strip<1>(v + strip * LANES, value_stride, count, o + strip * LANES);
  }

  void finish(int64_t slot, const mllm::AttentionTask& task) {
    const Block& b = blocks[slot];
    for (int64_t r = 0; r < b.count; ++r) {
      const float sum = total(load(sums.data() + (slot * ROWS + r) * LANES));
      write_row<T>(p, task.batch, b.head, b.row + r, out.data() + (slot * ROWS + r) * wide, sum, b.peak[r]);
    }
  }
};

template <typename T>
static void prefill(const mllm::AttentionProblem& p) {
  mllm::run_prefill<Prefill<T>>(p, ROWS, CHUNK, [](auto) { return 0; });
}
