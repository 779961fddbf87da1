// Attention of a few rows to one key head. Included inside a namespace, once an instruction set, after cpu/products.h:
// no include guard.
//
// The queries that share a key head are stacked, entries by heads, and go against four keys at a time like the rows of a
// linear layer. All scores of an item are held: the keys are read once, and the values once.

constexpr int STACKED = 24;  // most queries of an item, unless a group alone has more

// scores [rows][stride] = packed queries . keys [from, to)
template <typename T>
static void scores_of(int64_t rows, const float* packed, const T* keys, int64_t step, int64_t width, int64_t count,
                      float* scores, int64_t stride) {
  float sum[MOST][WEIGHTS];
  const auto four = [&](int64_t n) {
    multiply(rows, packed, keys + n * step, step, width, nullptr, 0, sum);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(sum[r], WEIGHTS, scores + r * stride + n);
  };
  int64_t n = 0;
  for (; n + WEIGHTS <= count; n += WEIGHTS) four(n);
  if (n < count && count >= WEIGHTS) return four(count - WEIGHTS);  // some of them again
  for (; n < count; ++n)
    for (int64_t r = 0; r < rows; ++r) {
      vec all = {};
      for (int64_t e = 0; e < width; e += LANES) all += load(packed + e * rows + r * LANES) * load(keys + n * step + e);
      scores[r * stride + n] = total(all);
    }
}

static inline uint8_t segment_of(uint8_t id) {
  if (id > 31) throw std::invalid_argument("segments holds ids 0 to 31, got " + std::to_string(id));
  return id;
}

// In place: scores, in powers of two, of keys [begin, end) become weights, all others 0. Returns their log-sum-exp.
static float weights_of(float* x, int64_t begin, int64_t end, int64_t count, const uint8_t* segments, uint32_t closed) {
  if (closed)
    for (int64_t n = begin; n < end; ++n)
      if (closed >> segment_of(segments[n]) & 1) x[n] = -INFINITY;
  std::fill_n(x, begin, 0.0f);
  std::fill(x + end, x + count, 0.0f);
  float top = -INFINITY;
  int64_t n = begin;
  vec most = splat(-INFINITY);
  for (; n + LANES <= end; n += LANES) most = maximum(load(x + n), most);
  for (; n < end; ++n) top = std::max(top, x[n]);
  top = std::max(top, greatest(most));
  if (top == -INFINITY) {  // sees no key, or nothing but NaN, which stays
    for (n = begin; n < end; ++n) x[n] = x[n] == -INFINITY ? 0.0f : x[n];
    return top;
  }
  vec sums = {};
  float sum = 0;
  for (n = begin; n + LANES <= end; n += LANES) {
    const vec score = load(x + n), y = score == -INFINITY ? (vec){} : exp2(score - top);
    store(x + n, y);
    sums += y;
  }
  for (; n < end; ++n) sum += x[n] = x[n] == -INFINITY ? 0.0f : std::exp2(x[n] - top);
  sum += total(sums);
  const float share = 1 / sum;
  for (n = begin; n + LANES <= end; n += LANES) store(x + n, load(x + n) * share);
  for (; n < end; ++n) x[n] *= share;
  return top + std::log2(sum);
}

// out [rows], `width` each, = weights [rows][stride] . values
template <int ROWS, typename T>
static void values_of(const float* weights, int64_t stride, const T* values, int64_t step, int64_t width,
                      int64_t count, float* const* out) {
  constexpr int VECTORS = 4;
  int64_t e = 0;
  const auto some = [&](auto vectors) {
    constexpr int N = decltype(vectors)::value;
    vec sum[ROWS][N] = {};
    for (int64_t n = 0; n < count; ++n) {
      const T* value = values + n * step + e;
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const float weight = weights[r * stride + n];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) sum[r][i] += load(value + i * LANES) * weight;
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < N; ++i) store(out[r] + e + i * LANES, sum[r][i]);
    e += N * LANES;
  };
  while (e + VECTORS * LANES <= width) some(std::integral_constant<int, VECTORS>{});
  while (e < width) some(std::integral_constant<int, 1>{});
}

template <typename T>
static void values_of(int64_t rows, const float* weights, int64_t stride, const T* values, int64_t step,
                      int64_t width, int64_t count, float* const* out) {
  switch (rows) {
    case 1: return values_of<1>(weights, stride, values, step, width, count, out);
    case 2: return values_of<2>(weights, stride, values, step, width, count, out);
#if LANES == 16
    case 3: return values_of<3>(weights, stride, values, step, width, count, out);
    case 4: return values_of<4>(weights, stride, values, step, width, count, out);
    case 5: return values_of<5>(weights, stride, values, step, width, count, out);
    default: return values_of<6>(weights, stride, values, step, width, count, out);
#endif
  }
}

template <typename T>
static void attend_item(const mllm::DecoderSizes& sizes, const mllm::DecoderPass& p, mllm::DecoderRoom& room,
                        const mllm::AttentionItem& item, int64_t kv_head, int64_t layer, float scale,
                        mllm::Floats& own) {
  const mllm::DecoderPart& part = p.parts[item.part];
  const auto& [slot_stride, head_stride, step] = part.keys.strides;
  const mllm::DecoderEntry* entries = part.entries.data() + item.first;
  const int64_t group = sizes.group(), width = sizes.width, count = item.end - item.begin;
  const int64_t at = entries[0].slot * slot_stride + kv_head * head_stride + item.begin * step;
  const T* keys = static_cast<const T*>(part.keys.layers[layer][0]) + at;
  const T* values = static_cast<const T*>(part.keys.layers[layer][1]) + at;
  const int64_t stride = (count + LANES - 1) / LANES * LANES, all = sizes.queries() + 2 * sizes.keys();
  own.resize(MOST * (width + stride));
  float *packed = own.data(), *scores = packed + MOST * width;
  const mllm::RowBlocks blocks(item.count * group, MOST);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t first = blocks.first(b), rows = blocks.size(b);
    float* out[MOST];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t entry = (first + i) / group, head = kv_head * group + (first + i) % group;
      const float* query = room.qkv.data() + entries[entry].row * all + head * width;
      for (int64_t e = 0; e < width; e += LANES)
        store(packed + e * rows + i * LANES, load(query + e) * (scale * 1.4426950408889634f));
      out[i] = room.partial.data() + (room.before[item.part] + item.first + entry) * sizes.queries() + head * width;
    }
    scores_of(rows, packed, keys, step, width, count, scores, stride);
    for (int64_t i = 0; i < rows; ++i) {
      const mllm::DecoderEntry& entry = entries[(first + i) / group];
      const mllm::DecoderMask mask = part.masks.empty() ? mllm::DecoderMask{} : part.masks[layer];
      const uint8_t* segments = mask.segments ? mask.segments + entry.slot * mask.stride : nullptr;
      const int64_t head = kv_head * group + (first + i) % group;
      const int64_t index = room.before[item.part] + item.first + (first + i) / group;
      room.lse[index * sizes.heads + head] =
          weights_of(scores + i * stride, entry.begin - item.begin, entry.end - item.begin, count,
                     segments ? segments + item.begin : nullptr, segments ? mask.table[segment_of(segments[entry.place])] : 0);
    }
    values_of(rows, scores, stride, values, step, width, count, out);
  }
}
