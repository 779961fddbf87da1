// The attention mass of each key, from queries, keys and the rows' log-sum-exp: no pass over the values. Included like
// cpu_prefill.h.

template <typename T>
static void add_mass(const mllm::AttentionProblem& p) {
  constexpr int64_t chunk_keys = CHUNK;
  const int64_t chunks = (p.keys + chunk_keys - 1) / chunk_keys;
  std::atomic<int64_t> next{0};
  mllm::parallel(p.threads, [&](int) {
    mllm::Floats packed(p.width * chunk_keys), queries(ROWS * p.width);
    std::vector<int64_t> chosen;
    for (int64_t task; (task = next++) < p.batch * p.heads;) {
      const int64_t b = task / p.heads, head = task % p.heads;
      const mllm::Sight sight(p, b);
      chosen.clear();
      for (int64_t i = 0; i < p.rows; ++i)
        if (!p.mass_rows || p.mass_rows[b * p.rows + i]) chosen.push_back(i);
      const float share = 1.0f / std::max<size_t>(1, chosen.size());
      const float* lse = p.lse + task * p.rows;
      const T* q = static_cast<const T*>(p.query) + b * p.query_strides.batch + head * p.query_strides.head;
      const T* k = static_cast<const T*>(p.key) + b * p.key_strides.batch + head / p.group() * p.key_strides.head;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t from = c * chunk_keys, to = std::min(p.keys, from + chunk_keys);
        const mllm::Bits present = sight.present_in(from, to);
        bool is_packed = false;
        vec sum[VECS] = {};
        for (size_t at = 0; at < chosen.size(); at += ROWS) {
          const int count = static_cast<int>(std::min<size_t>(ROWS, chosen.size() - at));
          mllm::Bits closed_to_all = ~mllm::Bits(0);
          for (int r = 0; r < count; ++r) closed_to_all &= sight.closed(chosen[at + r]);
          if (from > sight.position(chosen[at + count - 1]) || to <= sight.first || !(present & ~closed_to_all)) continue;
          if (!is_packed) pack_single_keys(k + from * p.key_strides.row, p.key_strides.row, to - from, p.width, packed.data());
          is_packed = true;
          for (int r = 0; r < ROWS; ++r)
            for (int64_t e = 0; e < p.width; ++e)
              queries[r * p.width + e] =
                  r < count ? widen(q[chosen[at + r] * p.query_strides.row + e]) * p.log2_scale() : 0.0f;
          vec x[ROWS][VECS];
          multiply_keys(queries.data(), packed.data(), p.width, x);
          for (int r = 0; r < count; ++r) {
            const int64_t row = chosen[at + r];
            if (lse[row] == mllm::UNSET) continue;
            for (int j = 0; j < VECS; ++j) {
              if (p.softcap != 0) x[r][j] = capped(x[r][j], p.log2_softcap());
              const ivec unseen = hidden(sight, from + j * LANES, sight.position(row), sight.closed(row));
              const vec alpha = exp2(x[r][j] - lse[row] * 1.4426950408889634f);
              sum[j] += unseen ? (vec){} : alpha;
            }
          }
        }
        for (int64_t i = from; i < to; ++i)
          p.mass[task * p.keys + i] = sum[(i - from) / LANES][(i - from) % LANES] * share;
      }
    }
  });
}
