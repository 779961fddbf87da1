// Few rows over many keys. Included inside a namespace, once an instruction set, after cpu/vector.h: no include guard.
//
// Nothing is packed: the keys that some row sees are listed, and each of them and its value are read once. The heads
// that share a key head are rows of one task; a task may be a part of the list, then the parts are joined.

constexpr int64_t KEYS_TOGETHER = 64;  // values held in the first cache while all rows take them
constexpr int64_t MOST_ROWS = 16;      // of a task
constexpr int64_t AHEAD = 16;          // keys that are fetched before they are read

template <typename T>
static inline vec dot_tail(const T* k, const float* q, int64_t from, int64_t width) {
  vec x = {};
  for (int64_t e = from; e < width; ++e) x[0] += widen(k[e]) * q[e];
  return x;
}

template <typename T>
class Decode {
 public:
  // One key head's rows against one part of its open keys.
  struct Part {
    int64_t batch, kv_head;
    const int32_t* open;  // the keys
    int64_t count;
    mllm::Floats weights, out;  // [rows][count], [rows][wide]
    float peak[MOST_ROWS], sum[MOST_ROWS];
  };

  explicit Decode(const mllm::AttentionProblem& problem)
      : p(problem), wide((p.width + LANES - 1) / LANES * LANES), whole(p.width / LANES * LANES), rows(p.group() * p.rows) {}

  void run(Part& part, const mllm::Sight& sight) const {
    part.weights.resize(rows * part.count);
    part.out.assign(rows * wide, 0.0f);
    score(part);
    for (int64_t m = 0; m < rows; ++m) weigh(part, sight, m);
    for (int64_t at = 0; at < part.count; at += KEYS_TOGETHER)
      for (int64_t m = 0; m < rows; ++m) add_values(part, m, at, std::min(part.count, at + KEYS_TOGETHER));
  }

  // Joins the parts of one key head into the outputs.
  void join(Part* parts, int64_t count) const {
    for (int64_t m = 0; m < rows; ++m) {
      float top = mllm::UNSET, sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const float peak = parts[i].peak[m];
        top = peak > top || peak != peak ? peak : top;
      }
      const int64_t head = parts->kv_head * p.group() + m / p.rows, row = m % p.rows, b = parts->batch;
      float share[64];  // of each part in the sum; 0 where it has no key that the row sees
      for (int64_t i = 0; i < count; ++i) {
        share[i] = parts[i].peak[m] != mllm::UNSET ? std::exp2(parts[i].peak[m] - top) : 0.0f;
        if (share[i] != 0) sum += parts[i].sum[m] * share[i];
      }
      float* o = parts->out.data() + m * wide;  // the first part's takes the others in
      for (int64_t e = 0; e < p.width; ++e) o[e] = share[0] != 0 ? o[e] * share[0] : 0.0f;
      for (int64_t i = 1; i < count; ++i)
        if (share[i] != 0)
          for (int64_t e = 0; e < p.width; ++e) o[e] += share[i] * parts[i].out[m * wide + e];
      write_row<T>(p, b, head, row, o, sum, top);
      if (p.mass && sum != 0 && (!p.mass_rows || p.mass_rows[b * p.rows + row])) {
        int64_t chosen = p.rows;
        if (p.mass_rows) chosen = std::count_if(p.mass_rows + b * p.rows, p.mass_rows + (b + 1) * p.rows, [](auto x) { return x; });
        float* mass = p.mass + (b * p.heads + head) * p.keys;
        for (int64_t i = 0; i < count; ++i)
          for (int64_t k = 0; k < parts[i].count; ++k)
            mass[parts[i].open[k]] += parts[i].weights[m * parts[i].count + k] * (share[i] / sum) / chosen;
      }
    }
  }

 private:
  const mllm::AttentionProblem& p;
  const int64_t wide, whole, rows;

  const T* row_of(const void* base, const mllm::Strides& strides, const Part& part, int64_t key) const {
    return static_cast<const T*>(base) + part.batch * strides.batch + part.kv_head * strides.head + key * strides.row;
  }

  static void prefetch(const T* from, int64_t values) {
    for (int64_t e = 0; e < values; e += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + e, 0, 3);
  }

  void score(Part& part) const {
    mllm::Floats queries(rows * p.width);
    for (int64_t m = 0; m < rows; ++m) {
      const T* q = static_cast<const T*>(p.query) + part.batch * p.query_strides.batch +
                   (part.kv_head * p.group() + m / p.rows) * p.query_strides.head + m % p.rows * p.query_strides.row;
      for (int64_t e = 0; e < p.width; ++e) queries[m * p.width + e] = widen(q[e]) * p.log2_scale();
    }
    constexpr int AT_ONCE = 4;
    for (int64_t i = 0; i < part.count; i += AT_ONCE) {
      const T* k[AT_ONCE];
      for (int j = 0; j < AT_ONCE; ++j)
        k[j] = row_of(p.key, p.key_strides, part, part.open[std::min(i + j, part.count - 1)]);
      for (int j = 0; j < AT_ONCE; ++j)
        prefetch(row_of(p.key, p.key_strides, part, part.open[std::min(i + j + AHEAD, part.count - 1)]), p.width);
      for (int64_t m = 0; m < rows; ++m) {
        const float* q = queries.data() + m * p.width;
        vec x[AT_ONCE];
#pragma GCC unroll 4
        for (int j = 0; j < AT_ONCE; ++j) x[j] = dot_tail(k[j], q, whole, p.width);
        for (int64_t e = 0; e < whole; e += LANES) {
          const vec y = load(q + e);
#pragma GCC unroll 4
          for (int j = 0; j < AT_ONCE; ++j) x[j] += load(k[j] + e) * y;
        }
        for (int j = 0; j < std::min<int64_t>(AT_ONCE, part.count - i); ++j)
          part.weights[m * part.count + i + j] = total(x[j]);
      }
    }
  }

  void weigh(Part& part, const mllm::Sight& sight, int64_t m) const {
    float* x = part.weights.data() + m * part.count;
    const int64_t row = m % p.rows, position = sight.position(row);
    const mllm::Bits closed = sight.closed(row);
    if (p.rows > 1)  // a single row sees every key that is listed
      for (int64_t i = 0; i < part.count; ++i)
        if (part.open[i] > position || sight.bit[part.open[i]] & closed) x[i] = mllm::UNSET;
    float top = mllm::UNSET, sum = 0;
    for (int64_t i = 0; i < part.count; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
    int64_t i = 0;
    if (top == mllm::UNSET) {
      std::fill_n(x, part.count, 0.0f);
    } else {
      vec lanes = {};
      const vec peak = splat(top);
      auto weight = [&](vec y) { return y > mllm::UNSET ? exp2(y - peak) : (y == y ? (vec){} : y); };
      for (; i + LANES <= part.count; i += LANES) {
        const vec y = weight(load(x + i));
        lanes += y;
        store(x + i, y);
      }
      if (i < part.count) {
        float rest[LANES];
        std::fill_n(rest, LANES, mllm::UNSET);
        std::copy(x + i, x + part.count, rest);
        const vec y = weight(load(rest));
        lanes += y;
        store(rest, y);
        std::copy_n(rest, part.count - i, x + i);
      }
      sum = total(lanes);
    }
    part.peak[m] = top;
    part.sum[m] = sum;
  }

  template <int NV>
  void add_strip(const Part& part, int64_t m, int64_t from, int64_t to, int64_t column) const {
    float* o = const_cast<float*>(part.out.data()) + m * wide + column;
    const float* w = part.weights.data() + m * part.count;
    vec x[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) x[j] = load(o + j * LANES);
    for (int64_t i = from; i < to; ++i) {
      const T* v = row_of(p.value, p.value_strides, part, part.open[i]) + column;
      const int32_t ahead = part.open[std::min(i + AHEAD, part.count - 1)];
      prefetch(row_of(p.value, p.value_strides, part, ahead) + column, NV * LANES);
      const vec y = splat(w[i]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) x[j] += load(v + j * LANES) * y;
    }
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(o + j * LANES, x[j]);
  }

  void add_values(Part& part, int64_t m, int64_t from, int64_t to) const {
    int64_t column = 0;
    for (; column + 8 * LANES <= whole; column += 8 * LANES) add_strip<8>(part, m, from, to, column);
    for (; column + 2 * LANES <= whole; column += 2 * LANES) add_strip<2>(part, m, from, to, column);
    for (; column < whole; column += LANES) add_strip<1>(part, m, from, to, column);
    if (whole == p.width) return;
    for (int64_t i = from; i < to; ++i) {
      const T* v = row_of(p.value, p.value_strides, part, part.open[i]);
      const float w = part.weights[m * part.count + i];
      for (int64_t e = whole; e < p.width; ++e) part.out[m * wide + e] += w * widen(v[e]);
    }
  }
};

template <typename T>
static void decode(const mllm::AttentionProblem& p) {
  const Decode<T> kernel(p);
  std::vector<mllm::Sight> sights;
  std::vector<std::vector<int32_t>> open(p.batch);
  int64_t most = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const mllm::Sight& sight = sights.emplace_back(p, b);
    const mllm::RowsView view(sight, 0, p.rows);
    for (int64_t k = sight.first; k < p.keys; ++k)
      if (sight.bit[k] & ~view.closed_to_all) open[b].push_back(static_cast<int32_t>(k));
    most = std::max<int64_t>(most, open[b].size());
  }
  // a thread is worth waking for a few hundred kilobytes
  const double bytes = 2.0 * sizeof(T) * p.width * most * p.kv_heads * p.batch;
  const int threads = static_cast<int>(std::clamp(bytes / 262144, 1.0, static_cast<double>(p.threads)));
  const int64_t units = p.batch * p.kv_heads;
  const int64_t pieces = units >= threads ? 1 : std::clamp<int64_t>(most / 256, 1, std::min<int64_t>(64, threads));
  std::vector<typename Decode<T>::Part> parts(units * pieces);
  for (int64_t i = 0; i < units * pieces; ++i) {
    const int64_t unit = i / pieces, piece = i % pieces, b = unit / p.kv_heads, count = open[b].size();
    parts[i].batch = b;
    parts[i].kv_head = unit % p.kv_heads;
    parts[i].open = open[b].data() + count * piece / pieces;
    parts[i].count = count * (piece + 1) / pieces - count * piece / pieces;
  }
  std::atomic<int64_t> next{0};
  mllm::parallel(threads, [&](int) {
    for (int64_t i; (i = next++) < units * pieces;) {
      kernel.run(parts[i], sights[parts[i].batch]);
      if (pieces == 1) kernel.join(&parts[i], 1);
    }
  });
  if (pieces > 1)
    for (int64_t u = 0; u < units; ++u) kernel.join(&parts[u * pieces], pieces);
}
