// Few rows over many keys. Included inside a namespace, once an instruction set, after cpu/lanes.h: no include guard.
//
// Nothing is packed: of the keys that some row sees each is read once, and so is its value, and the time is that of
// reading them. They come in runs of neighbours, fetched into the second cache well ahead (the first cache's own
// requests in flight are too few to keep the memory busy: 24 GB/s in place of 32 on two cores of a Zen 4), the values
// behind the keys, the next head's keys behind the values. The heads that share a key head are rows of one task; a task
// may be a part of the keys, then the parts are joined.

constexpr int64_t KEYS_TOGETHER = 64;  // values held in the first cache while all rows take them
constexpr int64_t MOST_ROWS = 16;      // of a task
constexpr int64_t AHEAD = 16384;       // bytes that are fetched before they are read
constexpr int64_t FETCHED = 8;         // values that are asked for in one go

// Neighbouring keys that some row sees; `before`: how many such keys come before them.
struct Run {
  int64_t from, to, before;
};

// What some row of a sequence sees.
struct OpenKeys {
  std::vector<Run> runs;
  int64_t count = 0;

  OpenKeys(const mllm::AttentionProblem& p, int64_t b) {
    const int64_t first = p.start ? std::clamp<int64_t>(p.start[b], 0, p.keys) : 0;
    if (!p.segments) {
      add(first, p.keys);
      return;
    }
    const uint8_t* ids = p.segments + b * p.segment_stride;
    uint8_t bad = 0;
    for (int64_t k = 0; k < p.keys; ++k) bad |= ids[k];
    if (bad > 31)
      throw std::invalid_argument("segments holds ids 0 to 31, got " + std::to_string(*std::max_element(ids, ids + p.keys)));
    mllm::Bits closed_to_all = ~mllm::Bits(0);
    for (int64_t r = 0; r < p.rows; ++r) closed_to_all &= p.table[ids[p.offset + r]];
    auto open = [&](int64_t k) { return !(closed_to_all >> ids[k] & 1); };
    for (int64_t k = first; k < p.keys;) {
      while (k < p.keys && !open(k)) ++k;
      const int64_t from = k;
      while (k < p.keys && open(k)) ++k;
      add(from, k);
    }
  }

 private:
  void add(int64_t from, int64_t to) {
    if (from >= to) return;
    runs.push_back({from, to, count});
    count += to - from;
  }
};

template <typename T>
class Decode {
 public:
  // One key head's rows against some of its open keys, those numbered [first, first + count).
  struct Part {
    int64_t batch = 0, kv_head = 0, first = 0, count = 0;
    mllm::Floats weights, out;  // [rows][count], [rows][wide]
    float peak[MOST_ROWS], sum[MOST_ROWS];
  };

  Decode(const mllm::AttentionProblem& problem, const std::vector<OpenKeys>& keys)
      : p(problem),
        open(keys),
        wide((p.width + LANES - 1) / LANES * LANES),
        whole(p.width / LANES * LANES),
        rows(p.group() * p.rows),
        ahead(std::max<int64_t>(1, AHEAD / (p.width * sizeof(T)))) {}

  // Goes through the keys of a part, its values, then those of the next part, and fetches them.
  class Fetcher {
   public:
    explicit Fetcher(const Decode& decode) : d(decode) {}

    // `then`: the part that this thread does next, or null.
    void enter(const Part& part, const Part* then) {
      next = then;
      if (at == &part) return;  // it was begun behind the part before it
      begin(&part);
      advance(d.ahead);
    }
    void advance(int64_t count) {
      for (; at && count > 0; --count) {
        if (key == end && !more()) return;
        const mllm::Strides& strides = values ? d.p.value_strides : d.p.key_strides;
        const T* row = d.row_of(values ? d.p.value : d.p.key, strides, *at, key++);
        for (int64_t e = 0; e < d.p.width; e += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + e, 0, 2);
      }
    }

   private:
    const Decode& d;
    const Part *at = nullptr, *next = nullptr;
    bool values = false;
    size_t run = 0;               // the next one
    int64_t key = 0, end = 0;  // in the run at hand

    void begin(const Part* part) {
      at = part;
      values = false;
      run = 0;
      key = end = 0;
    }
    // To the next run, the values, the next part.
    bool more() {
      while (at) {
        const std::vector<Run>& runs = d.open[at->batch].runs;
        for (; run < runs.size(); ++run) {
          std::tie(key, end) = d.within(*at, runs[run]);
          if (key < end) return ++run, true;
        }
        if (!values) {
          values = true;
          run = 0;
        } else {
          begin(next);
          next = nullptr;
        }
      }
      return false;
    }
  };

  void run(Part& part, Fetcher& fetcher) const {
    part.weights.resize(rows * part.count);
    part.out.assign(rows * wide, 0.0f);
    score(part, fetcher);
    for (int64_t m = 0; m < rows; ++m) weigh(part, m);
    each_run(part, [&](int64_t from, int64_t to, int64_t index) {
      for (int64_t k = from; k < to; k += KEYS_TOGETHER) {
        const int64_t end = std::min(to, k + KEYS_TOGETHER);
        for (int64_t few = k; few < end; few += FETCHED) {
          const int64_t until = std::min(end, few + FETCHED);
          fetcher.advance(until - few);
          add_values(part, 0, few, until, index + few - from);
        }
        for (int64_t m = 1; m < rows; ++m) add_values(part, m, k, end, index + k - from);
      }
    });
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
      const float factor = write_row<T>(p, b, head, row, o, sum, top);
      if (p.mass && sum != 0 && (!p.mass_rows || p.mass_rows[b * p.rows + row])) {
        int64_t chosen = p.rows;
        if (p.mass_rows) chosen = std::count_if(p.mass_rows + b * p.rows, p.mass_rows + (b + 1) * p.rows, [](auto x) { return x; });
        float* mass = p.mass + (b * p.heads + head) * p.keys;
        for (int64_t i = 0; i < count; ++i) {
          const float* w = parts[i].weights.data() + m * parts[i].count;
          each_run(parts[i], [&](int64_t from, int64_t to, int64_t index) {
            for (int64_t k = from; k < to; ++k) mass[k] += w[index + k - from] * (share[i] * factor) / chosen;
          });
        }
      }
    }
  }

 private:
  const mllm::AttentionProblem& p;
  const std::vector<OpenKeys>& open;
  const int64_t wide, whole, rows, ahead;

  // The keys of a run that belong to a part: from, to.
  std::pair<int64_t, int64_t> within(const Part& part, const Run& run) const {
    const int64_t shift = run.from - run.before;  // from numbers to keys
    return {std::max(run.from, part.first + shift), std::min(run.to, part.first + part.count + shift)};
  }

  // f(from, to, index) for the neighbours among a part's keys, `index` the first one's place in the part.
  template <typename F>
  void each_run(const Part& part, F f) const {
    for (const Run& run : open[part.batch].runs) {
      const auto [from, to] = within(part, run);
      if (from < to) f(from, to, from - run.from + run.before - part.first);
    }
  }

  const T* row_of(const void* base, const mllm::Strides& strides, const Part& part, int64_t key) const {
    return static_cast<const T*>(base) + part.batch * strides.batch + part.kv_head * strides.head + key * strides.row;
  }

  void score(Part& part, Fetcher& fetcher) const {
    mllm::Floats queries(rows * p.width);
    for (int64_t m = 0; m < rows; ++m) {
      const T* q = static_cast<const T*>(p.query) + part.batch * p.query_strides.batch +
                   (part.kv_head * p.group() + m / p.rows) * p.query_strides.head + m % p.rows * p.query_strides.row;
      for (int64_t e = 0; e < p.width; ++e) queries[m * p.width + e] = widen(q[e]) * p.log2_scale();
    }
    each_run(part, [&](int64_t from, int64_t to, int64_t index) {
      int64_t k = from;
      for (; k + 4 <= to; k += 4) {
        fetcher.advance(4);
        score_keys<4>(part, queries.data(), k, index + k - from);
      }
      fetcher.advance(to - k);
      for (; k < to; ++k) score_keys<1>(part, queries.data(), k, index + k - from);
    });
  }

  template <int KEYS>
  void score_keys(Part& part, const float* queries, int64_t key, int64_t index) const {
    const T* k[KEYS];
    for (int j = 0; j < KEYS; ++j) k[j] = row_of(p.key, p.key_strides, part, key + j);
    for (int64_t m = 0; m < rows; ++m) {
      const float* q = queries + m * p.width;
      vec x[KEYS];
#pragma GCC unroll 4
      for (int j = 0; j < KEYS; ++j) x[j] = dot_tail(k[j], q);
      for (int64_t e = 0; e < whole; e += LANES) {
        const vec y = load(q + e);
#pragma GCC unroll 4
        for (int j = 0; j < KEYS; ++j) x[j] += load(k[j] + e) * y;
      }
      for (int j = 0; j < KEYS; ++j) part.weights[m * part.count + index + j] = total(x[j]);
    }
  }

  vec dot_tail(const T* k, const float* q) const {
    vec x = {};
    for (int64_t e = whole; e < p.width; ++e) x[0] += widen(k[e]) * q[e];
    return x;
  }

  void weigh(Part& part, int64_t m) const {
    float* x = part.weights.data() + m * part.count;
    if (p.softcap != 0) cap(x, part.count);
    if (p.rows > 1) hide(part, m % p.rows, x);  // a single row sees every key that is open
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

  void cap(float* x, int64_t count) const {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, capped(load(x + i), p.log2_softcap()));
    for (; i < count; ++i) x[i] = capped(splat(x[i]), p.log2_softcap())[0];
  }

  // The scores of keys that another row sees, but not this one.
  void hide(const Part& part, int64_t row, float* x) const {
    const int64_t position = std::min(p.offset + row, p.keys - 1);
    const uint8_t* ids = p.segments ? p.segments + part.batch * p.segment_stride : nullptr;
    const mllm::Bits closed = ids ? p.table[ids[p.offset + row]] : 0;
    each_run(part, [&](int64_t from, int64_t to, int64_t index) {
      for (int64_t k = from; k < to; ++k)
        if (k > position || (ids && closed >> ids[k] & 1)) x[index + k - from] = mllm::UNSET;
    });
  }

  template <int NV>
  void add_strip(Part& part, int64_t m, int64_t from, int64_t to, int64_t index, int64_t column) const {
    float* o = part.out.data() + m * wide + column;
    const float* w = part.weights.data() + m * part.count + index;
    const T* v = row_of(p.value, p.value_strides, part, from) + column;
    vec x[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) x[j] = load(o + j * LANES);
    for (int64_t k = from; k < to; ++k, v += p.value_strides.row) {
      const vec y = splat(*w++);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) x[j] += load(v + j * LANES) * y;
    }
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(o + j * LANES, x[j]);
  }

  void add_values(Part& part, int64_t m, int64_t from, int64_t to, int64_t index) const {
    int64_t column = 0;
    for (; column + 8 * LANES <= whole; column += 8 * LANES) add_strip<8>(part, m, from, to, index, column);
    for (; column + 2 * LANES <= whole; column += 2 * LANES) add_strip<2>(part, m, from, to, index, column);
    for (; column < whole; column += LANES) add_strip<1>(part, m, from, to, index, column);
    if (whole == p.width) return;
    for (int64_t k = from; k < to; ++k) {
      const T* v = row_of(p.value, p.value_strides, part, k);
      const float w = part.weights[m * part.count + index + k - from];
      for (int64_t e = whole; e < p.width; ++e) part.out[m * wide + e] += w * widen(v[e]);
    }
  }
};

template <typename T>
static void decode(const mllm::AttentionProblem& p) {
  using Part = typename Decode<T>::Part;
  std::vector<OpenKeys> open;
  int64_t most = 0;
  for (int64_t b = 0; b < p.batch; ++b) most = std::max(most, open.emplace_back(p, b).count);
  const Decode<T> kernel(p, open);
  // a thread is worth waking for a few hundred kilobytes
  const double bytes = 2.0 * sizeof(T) * p.width * most * p.kv_heads * p.batch;
  const int threads = static_cast<int>(std::clamp(bytes / 262144, 1.0, static_cast<double>(p.threads)));
  const int64_t units = p.batch * p.kv_heads;
  const int64_t pieces = units >= threads ? 1 : std::clamp<int64_t>(most / 256, 1, std::min<int64_t>(64, threads));
  auto begin = [&](Part& part, int64_t i) {
    const int64_t unit = i / pieces, piece = i % pieces;
    part.batch = unit / p.kv_heads;
    part.kv_head = unit % p.kv_heads;
    const int64_t count = open[part.batch].count;
    part.first = count * piece / pieces;
    part.count = count * (piece + 1) / pieces - part.first;
  };
  std::vector<Part> parts(pieces > 1 ? units * pieces : 0);  // to be joined when all are done
  std::atomic<int64_t> next{0};
  mllm::parallel(threads, [&](int) {
    Part own[2];
    typename Decode<T>::Fetcher fetcher(kernel);
    int turn = 0;
    for (int64_t i = next++, following; i < units * pieces; i = following, turn ^= 1) {
      following = next++;
      auto held = [&](int64_t n, int which) -> Part& { return pieces > 1 ? parts[n] : own[which]; };
      Part& part = held(i, turn);
      Part* then = following < units * pieces ? &held(following, turn ^ 1) : nullptr;
      begin(part, i);
      if (then) begin(*then, following);
      fetcher.enter(part, then);
      kernel.run(part, fetcher);
      if (pieces == 1) kernel.join(&part, 1);
    }
  });
  if (pieces > 1)
    for (int64_t u = 0; u < units; ++u) kernel.join(&parts[u * pieces], pieces);
}
