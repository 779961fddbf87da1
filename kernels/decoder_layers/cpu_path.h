// What cpu/each_isa.h compiles once an instruction set. A pass is a sequence of phases: norm, query and key and value,
// rotation, attention, its join, output projection, norm, gate and up, down. What a product reads is packed by the phase
// before it.
#include "../cpu/lanes.h"
#include "../cpu/products.h"
#include "../cpu/packed.h"
#include "../decoder_layers/cpu_attention.h"

static inline vec activated(vec x, mllm::Activation kind) {
  // silu x / (1 + exp(-x)); gelu by tanh is x / (1 + exp(-2 y)), y = sqrt(2 / pi) (x + 0.044715 x^3)
  const vec y = kind == mllm::Activation::SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
  const vec e = y * -1.4426950408889634f;
  return x / (1.0f + exp2(e < 126.0f ? e : splat(126.0f)));
}

// Of one thread; T is the type of weights, keys and values.
template <typename T>
struct DecoderWork {
  using Rows = PackedRows<T>;

  const mllm::DecoderSizes& sizes;
  const mllm::DecoderPass& p;
  mllm::DecoderRoom& room;
  const mllm::RowBlocks blocks;
  const int64_t layers;
  mllm::Floats& own;
  mllm::Phases::Thread& phase;

  // Items of a phase that a thread takes at a time, where one reads so many bytes.
  int64_t run(int64_t items, int64_t bytes) const {
    const int64_t large = std::max<int64_t>(1, (1 << 17) / bytes), fair = items / (4 * p.threads);
    return p.threads == 1 ? items : std::max<int64_t>(1, std::min(large, fair));
  }
  const float* rows_of(const mllm::Floats& packed, int64_t block, int64_t depth) const {
    return packed.data() + blocks.first(block) * depth;
  }
  // Puts LANES channels of a row into a packed array.
  void pack(mllm::Floats& packed, int64_t block, int64_t row, int64_t depth, int64_t channel, vec x) const {
    const int64_t first = blocks.first(block);
    Rows::put(packed.data() + first * depth, blocks.size(block), row - first, channel, x);
  }

  void norm(const mllm::DecoderNorm& norm, int64_t layer, bool record) {
    const int64_t hidden = sizes.hidden;
    phase(blocks.count, 1, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b)
        for (int64_t r = blocks.first(b); r < blocks.first(b + 1); ++r) {
          const float* x = p.x + r * hidden;
          const float scale = 1 / std::sqrt(dot(x, x, hidden) / hidden + norm.eps);
          for (int64_t e = 0; e < hidden; e += LANES)
            pack(room.normed, b, r, hidden, e, load(x + e) * scale * load(norm.gain + e));
          if (record) keep(p.residual, r, layer, x, hidden);
        }
    });
  }
  void keep(float* to, int64_t row, int64_t layer, const float* from, int64_t count) const {
    const int64_t index = room.record_of[row];
    if (index >= 0) std::copy_n(from, count, to + (index * layers + layer) * count);
  }

  // Calls work(first, last) for blocks of rows that stay in the second cache with a run of weights, one after the other.
  template <typename Work>
  void by_chunk(int64_t depth, const Work& work) const {
    const int64_t most = std::max<int64_t>(1, (1 << 19) / (MOST * depth * 4));
    for (int64_t b = 0; b < blocks.count; b += most) work(b, std::min(b + most, blocks.count));
  }

  // put(row, column, four sums) of a tile of WEIGHTS rows of a weight, against blocks [from, to) of rows.
  template <typename Put>
  void tile(const mllm::DecoderLinear& linear, int64_t n, const mllm::Floats& packed, int64_t depth, int64_t from,
            int64_t to, const Put& put) const {
    const T* w = static_cast<const T*>(linear.weight) + n * depth;
    constexpr int64_t LINES = std::max<int64_t>(1, WEIGHTS * Rows::STEP * sizeof(T) / LINE);  // of a tile a step
    const int64_t sharing = std::min<int64_t>(to - from, LINES), lines = (LINES + sharing - 1) / sharing;
    const float* wide = Rows::wide(w, depth, to - from);
    float sum[MOST][WEIGHTS];
    for (int64_t b = from; b < to; ++b) {
      const char* next = reinterpret_cast<const char*>(w + WEIGHTS * depth) + b * lines * LINE * (depth / Rows::STEP);
      // the first blocks of all fetch the next tile
      const int fetched = b < sharing ? lines : 0;
      if (wide)
        multiply(blocks.size(b), rows_of(packed, b, depth), wide, depth, depth, next, fetched, sum);
      else
        Rows::product(blocks.size(b), rows_of(packed, b, depth), w, depth, depth, next, fetched, sum);
      for (int64_t r = blocks.first(b), i = 0; r < blocks.first(b + 1); ++r, ++i) {
        if (linear.bias)
          for (int j = 0; j < WEIGHTS; ++j) sum[i][j] += linear.bias[n + j];
        put(r, n, sum[i]);
      }
    }
  }

  void query_key_value(const mllm::DecoderLayer& layer) {
    const int64_t queries = sizes.queries(), keys = sizes.keys(), all = queries + 2 * keys;
    const int64_t tiles = all / WEIGHTS;
    phase(tiles, run(tiles, WEIGHTS * sizes.hidden * sizeof(T)), [&](int64_t from, int64_t to) {
      by_chunk(sizes.hidden, [&](int64_t block, int64_t last) {
        for (int64_t t = from; t < to; ++t) {
          const int64_t n = t * WEIGHTS;
          const bool q = n < queries, k = n < queries + keys;
          const int64_t first = q ? 0 : k ? queries : queries + keys;
          tile(q ? layer.query : k ? layer.key : layer.value, n - first, room.normed, sizes.hidden, block, last,
               [&](int64_t r, int64_t column, const float* sum) {
                 std::copy_n(sum, WEIGHTS, room.qkv.data() + r * all + first + column);
               });
        }
      });
    });
  }

  // In place: the norm of one head, and its rotation, the first half of the turning channels against the second.
  void turn(float* x, const mllm::DecoderNorm& norm, const float* cos, const float* sin) const {
    if (norm.gain) {
      const float scale = 1 / std::sqrt(dot(x, x, sizes.width) / sizes.width + norm.eps);
      for (int64_t e = 0; e < sizes.width; e += LANES) store(x + e, load(x + e) * scale * load(norm.gain + e));
    }
    const int64_t half = p.rotary / 2;
    int64_t e = 0;
    for (; e + LANES <= half; e += LANES) {
      const vec a = load(x + e), b = load(x + e + half);
      store(x + e, a * load(cos + e) - b * load(sin + e));
      store(x + e + half, b * load(cos + e + half) + a * load(sin + e + half));
    }
    for (; e < half; ++e) {
      const float a = x[e], b = x[e + half];
      x[e] = a * cos[e] - b * sin[e];
      x[e + half] = b * cos[e + half] + a * sin[e + half];
    }
  }

  void rotate(const mllm::DecoderLayer& layer, int64_t index) {
    const int64_t queries = sizes.queries(), keys = sizes.keys(), width = sizes.width;
    phase(p.rows, run(p.rows, 4 * (queries + 2 * keys)), [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) {
        float* x = room.qkv.data() + r * (queries + 2 * keys);
        const float *cos = p.cos + r * p.rotary, *sin = p.sin + r * p.rotary;
        for (int64_t h = 0; h < sizes.heads; ++h) turn(x + h * width, layer.query_norm, cos, sin);
        keep(p.queries, r, index, x, queries);
        const auto& [slots, heads, positions] = p.store.strides;
        const int64_t at = p.places[2 * r] * slots + p.places[2 * r + 1] * positions;
        for (int64_t h = 0; h < sizes.kv_heads; ++h) {
          float* key = x + queries + h * width;
          turn(key, layer.key_norm, cos, sin);
          store_scaled(key, 1, width, static_cast<T*>(p.store.layers[index][0]) + at + h * heads);
          store_scaled(key + keys, 1, width, static_cast<T*>(p.store.layers[index][1]) + at + h * heads);
        }
      }
    });
  }

  void attend(const mllm::DecoderLayer& layer, int64_t index) {
    const int64_t items = room.items.size() * sizes.kv_heads;
    // all items of a key head follow each other, so that its keys stay in the caches
    phase(items, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i)
        attend_item<T>(sizes, p, room, room.items[i % room.items.size()], i / room.items.size(), index, layer.scale, own);
    });
  }

  // Joins what a row found in its parts by their log-sum-exps.
  void join(int64_t index) {
    const int64_t width = sizes.width, queries = sizes.queries();
    phase(blocks.count, 1, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b)
        for (int64_t r = blocks.first(b); r < blocks.first(b + 1); ++r) {
          const int64_t *entry = room.entry_of.data() + room.first[r], count = room.first[r + 1] - room.first[r];
          own.resize(queries + count);
          float *out = own.data(), *share = out + queries;
          for (int64_t h = 0; h < sizes.heads; ++h) {
            float top = -INFINITY, sum = 0;
            for (int64_t i = 0; i < count; ++i) top = std::max(top, room.lse[entry[i] * sizes.heads + h]);
            for (int64_t i = 0; i < count; ++i) {
              const float lse = room.lse[entry[i] * sizes.heads + h];
              sum += share[i] = count == 1 || lse == top ? 1.0f : std::exp2(lse - top);
            }
            if (top == -INFINITY) sum = 1;
            for (int64_t e = 0; e < width; e += LANES) {
              vec all = {};
              for (int64_t i = 0; i < count; ++i)
                all += load(room.partial.data() + entry[i] * queries + h * width + e) * (share[i] / sum);
              store(out + h * width + e, all);
            }
          }
          for (int64_t e = 0; e < queries; e += LANES) pack(room.attended, b, r, queries, e, load(out + e));
          keep(p.outputs, r, index, out, queries);
        }
    });
  }

  // p.x += a linear layer of packed rows
  void add(const mllm::DecoderLinear& linear, const mllm::Floats& packed, int64_t depth) {
    const int64_t tiles = sizes.hidden / WEIGHTS;
    phase(tiles, run(tiles, WEIGHTS * depth * sizeof(T)), [&](int64_t from, int64_t to) {
      by_chunk(depth, [&](int64_t block, int64_t last) {
        for (int64_t t = from; t < to; ++t)
          tile(linear, t * WEIGHTS, packed, depth, block, last, [&](int64_t r, int64_t column, const float* sum) {
            float* x = p.x + r * sizes.hidden + column;
            for (int j = 0; j < WEIGHTS; ++j) x[j] += sum[j];
          });
      });
    });
  }

  void gate_and_up(const mllm::DecoderLayer& layer) {
    const int64_t units = sizes.inner / LANES;
    phase(units, run(units, 2 * LANES * sizes.hidden * sizeof(T)), [&](int64_t from, int64_t to) {
      own.resize(2 * p.rows * LANES);
      float *gate = own.data(), *up = gate + p.rows * LANES;
      by_chunk(sizes.hidden, [&](int64_t block, int64_t last) {
        for (int64_t u = from; u < to; ++u) {
          const int64_t first = u * LANES;
          const auto to_row = [&](float* unit) {
            return [=](int64_t r, int64_t column, const float* sum) {
              std::copy_n(sum, WEIGHTS, unit + r * LANES + column - first);
            };
          };
          for (int64_t n = first; n < first + LANES; n += WEIGHTS) {
            tile(layer.gate, n, room.normed, sizes.hidden, block, last, to_row(gate));
            tile(layer.up, n, room.normed, sizes.hidden, block, last, to_row(up));
          }
          for (int64_t b = block; b < last; ++b)
            for (int64_t r = blocks.first(b); r < blocks.first(b + 1); ++r)
              pack(room.inner, b, r, sizes.inner, first,
                   activated(load(gate + r * LANES), sizes.activation) * load(up + r * LANES));
        }
      });
    });
  }

  void last_norm() {
    const int64_t hidden = sizes.hidden;
    phase(p.rows, 1, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) {
        const float* x = p.x + r * hidden;
        const float scale = 1 / std::sqrt(dot(x, x, hidden) / hidden + p.final.eps);
        for (int64_t e = 0; e < hidden; e += LANES)
          store(p.normed + r * hidden + e, load(x + e) * scale * load(p.final.gain + e));
      }
    });
  }

  void begin(const mllm::DecoderLayer& one, int64_t index) {
    norm(one.input, index, true);
    query_key_value(one);
    rotate(one, index);
  }
  // Gives the needed rows' queries and residual stream to who goes on with them alone.
  void hand_over(DecoderWork& rest) {
    const int64_t hidden = sizes.hidden, queries = sizes.queries(), all = queries + 2 * sizes.keys();
    phase(p.needed, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        std::copy_n(p.x + p.needed_rows[i] * hidden, hidden, p.last + i * hidden);
        std::copy_n(room.qkv.data() + p.needed_rows[i] * all, queries, rest.room.qkv.data() + i * all);
      }
    });
  }
  void finish(const mllm::DecoderLayer& one, int64_t index) {
    attend(one, index);
    join(index);
    add(one.output, room.attended, sizes.queries());
    norm(one.middle, index, false);
    gate_and_up(one);
    add(one.down, room.inner, sizes.inner);
  }
};

// Kept by the thread: a decoder calls this once a token.
static mllm::DecoderRoom& decoder_room(int which) {
  static thread_local mllm::DecoderRoom rooms[2];
  return rooms[which];
}

template <typename T>
static void run_layers(const mllm::DecoderSizes& sizes, const std::vector<mllm::DecoderLayer>& layers,
                           const mllm::DecoderPass& given) {
  mllm::DecoderPass p = given;
  const double weights = static_cast<double>(sizes.hidden) * (2 * sizes.queries() + 2 * sizes.keys() + 3 * sizes.inner);
  // reading a byte takes as long as four operations or more
  p.threads = mllm::worthwhile_threads(p.threads, layers.size() * weights * std::max<double>(2 * p.rows, 16));
  mllm::DecoderRoom::check(p);
  const int64_t count = layers.size(), together = std::max<int64_t>(1, STACKED / sizes.group());
  std::optional<mllm::NeededPass> needed;
  if (p.needed >= 0) needed.emplace(p);
  const mllm::DecoderPass& end = needed ? needed->pass : p;
  mllm::DecoderRoom &room = decoder_room(0), &less = needed ? decoder_room(1) : room;
  room.prepare(sizes, p, together);
  if (needed) less.prepare(sizes, end, together);
  mllm::Phases phases(9 * count + 2);
  phases.run(p.threads, [&](int thread, mllm::Phases::Thread& way) {
    DecoderWork<T> work{sizes, p, room, mllm::RowBlocks(p.rows, MOST), count, room.scratch[thread], way};
    DecoderWork<T> rest{sizes, end, less, mllm::RowBlocks(end.rows, MOST), count, less.scratch[thread], way};
    for (int64_t i = 0; i < count; ++i) {
      const bool last = needed && i + 1 == count;
      work.begin(layers[i], i);
      if (last) work.hand_over(rest);
      (last ? rest : work).finish(layers[i], i);
    }
    rest.last_norm();
  });
}

static void decoder_layers(const mllm::DecoderSizes& sizes, const std::vector<mllm::DecoderLayer>& layers,
                           const mllm::DecoderPass& p) {
  sizes.bfloat16 ? run_layers<uint16_t>(sizes, layers, p) : run_layers<float>(sizes, layers, p);
}
