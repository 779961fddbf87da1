// What cpu/each_isa.h compiles once an instruction set.
#include "../cpu/lanes.h"

// The weights of one head, in place of its scores.
template <typename T>
static void weigh(const mllm::WeightedValues& p, const mllm::WeightedValues::Head& head, float* query, float* x) {
  const float log2_scale = head.scale * 1.4426950408889634f;
  const T *q = static_cast<const T*>(head.query), *k = static_cast<const T*>(head.keys);
  for (int64_t e = 0; e < p.width; ++e) query[e] = widen(q[e]) * log2_scale;
  float top = -INFINITY;
  for (int64_t n = 0; n < p.positions; ++n) {
    x[n] = head.seen && !head.seen[n] ? -INFINITY : dot(query, k + n * head.key_stride, p.width);
    top = x[n] > top || x[n] != x[n] ? x[n] : top;
  }
  double sum = 0;
  int64_t n = 0;
  for (; n + LANES <= p.positions; n += LANES) {
    const vec score = load(x + n);
    const vec y = score == -INFINITY ? (vec){} : exp2(score - top);
    store(x + n, y);
    sum += total(y);
  }
  for (; n < p.positions; ++n) {
    x[n] = x[n] == -INFINITY ? 0.0f : std::exp2(x[n] - top);
    sum += x[n];
  }
  const float share = static_cast<float>(1 / sum);
  for (n = 0; n < p.positions; ++n) x[n] *= share;
}

template <typename T>
static void weighted_values(const mllm::WeightedValues& p) {
  std::atomic<size_t> next{0};
  const double flops = 6.0 * p.heads.size() * p.positions * p.width;
  mllm::parallel(mllm::worthwhile_threads(p.threads, flops), [&](int) {
    mllm::Floats query(p.width), weight(p.positions);
    for (size_t g; (g = next++) < p.heads.size();) {
      weigh<T>(p, p.heads[g], query.data(), weight.data());
      const T* v = static_cast<const T*>(p.heads[g].values);
      float* out = p.out + g * p.positions * p.width;
      for (int64_t n = 0; n < p.positions; ++n, v += p.heads[g].value_stride, out += p.width) {
        int64_t e = 0;
        for (; e + LANES <= p.width; e += LANES) store(out + e, load(v + e) * weight[n]);
        for (; e < p.width; ++e) out[e] = widen(v[e]) * weight[n];
      }
    }
  });
}

static void weighted_values(const mllm::WeightedValues& p) {
  p.bfloat16 ? weighted_values<uint16_t>(p) : weighted_values<float>(p);
}
