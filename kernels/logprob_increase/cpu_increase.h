// Increases from logits and writes: what stands around the log-sum-exp. Included inside a namespace, once an
// instruction set, after cpu/lanes.h: no include guard.

constexpr float LOG2E = 1.4426950408889634f;
// a log-probability below the smallest float64: the word cannot be said. Kept apart from the running peak of the sums,
// which such words would drag far from all others.
constexpr float NEVER = -745.0f * LOG2E;

static inline float logit_of(float raw, float cap) { return cap > 0 ? cap * std::tanh(raw / cap) : raw; }

// logs[v] = log2 of the probabilities at one residual vector. Its logits are made in `logs` first; `raw`, where there
// is a cap, takes those before it.
static void log_probabilities(const mllm::Increase& p, int64_t source, float* logs, float* raw) {
  const float* lean = p.lean + source * p.vocab;
  const float scale = p.scale[source];
  float top = -INFINITY;
  for (int64_t v = 0; v < p.vocab; ++v) logs[v] = lean[v] * scale + (p.offset ? p.offset[v] : 0.0f);
  if (raw) std::copy_n(logs, p.vocab, raw);
  if (p.cap > 0)
    for (int64_t v = 0; v < p.vocab; ++v) logs[v] = logit_of(logs[v], p.cap);
  for (int64_t v = 0; v < p.vocab; ++v) top = logs[v] > top ? logs[v] : top;
  double sum = 0;
  int64_t v = 0;
  for (; v + LANES <= p.vocab;) {  // a float32 sum over all words would cost a decimal
    vec part = {};
    for (const int64_t end = std::min(p.vocab, v + 64 * LANES); v + LANES <= end; v += LANES)
      part += exp2((load(logs + v) - top) * LOG2E);
    sum += total(part);
  }
  for (; v < p.vocab; ++v) sum += std::exp2((logs[v] - top) * LOG2E);
  const float all = static_cast<float>(std::log2(sum));
  for (v = 0; v < p.vocab; ++v) {
    const float x = (logs[v] - top) * LOG2E - all;
    logs[v] = x <= NEVER ? -INFINITY : x;
  }
}

// `log_sum_exp`: of this instruction set, or of another of the same processor.
static void increase(const mllm::Increase& p, void (*log_sum_exp)(const mllm::Problem&)) {
  mllm::Floats logs(p.sources * p.vocab), raw(p.cap > 0 ? p.sources * p.vocab : 0);
  const int64_t count = p.groups * p.rows;
  std::atomic<int64_t> next{0};
  mllm::parallel(mllm::worthwhile_threads(p.threads, 20.0 * p.sources * p.vocab), [&](int) {
    for (int64_t b; (b = next++) < p.sources;)
      log_probabilities(p, b, logs.data() + b * p.vocab, p.cap > 0 ? raw.data() + b * p.vocab : nullptr);
  });
  // the sums work in powers of two; under a cap they need the increase itself, in nats
  const float unit = p.cap > 0 ? 1.0f : LOG2E;
  mllm::Floats writes(count * p.depth), shift(p.rescale ? count : 0);
  next = 0;
  mllm::parallel(mllm::worthwhile_threads(p.threads, 4.0 * count * p.depth), [&](int) {
    for (int64_t g; (g = next++) < p.groups;)
      for (int64_t i = g * p.rows; i < (g + 1) * p.rows; ++i) {
        const float after = (p.scale[p.source[g]] + (p.rescale ? p.rescale[i] : 0.0f)) * unit;
        const float* from = p.writes + i * p.depth;
        float* to = writes.data() + i * p.depth;
        if (p.gain)
          for (int64_t k = 0; k < p.depth; ++k) to[k] = from[k] * after * p.gain[k];
        else
          for (int64_t k = 0; k < p.depth; ++k) to[k] = from[k] * after;
        if (p.rescale) shift[i] = p.rescale[i] * unit;
      }
  });
  const int64_t together = p.operands.size() == 1 ? p.groups : 1;  // groups of one operand
  for (int64_t first = 0; first < p.groups; first += together) {
    const void* operand = p.operands[first / together];
    mllm::Problem q;
    q.writes = writes.data() + first * p.rows * p.depth;
    q.operand = operand;
    q.operand_bfloat16 = p.operand_bfloat16;
    q.source = p.source + first;
    q.base = logs.data();
    q.lean = p.rescale ? p.lean : nullptr;
    q.shift = p.rescale ? shift.data() + first * p.rows : nullptr;
    q.raw = p.cap > 0 ? raw.data() : nullptr;
    q.cap = p.cap;
    q.group_rows = p.rows;
    q.rows = together * p.rows;
    q.vocab = p.vocab;
    q.depth = p.depth;
    q.groups = together;
    q.out = p.out + first * p.rows;
    q.threads = p.threads;
    log_sum_exp(q);
    for (int64_t g = first; g < first + together; ++g) {  // the explained word's own logit
      const int64_t b = p.source[g], token = p.tokens[b];
      for (int64_t i = g * p.rows; i < (g + 1) * p.rows; ++i) {
        const float* write = writes.data() + i * p.depth;
        float change = p.operand_bfloat16 ? dot(write, static_cast<const uint16_t*>(operand) + token * p.depth, p.depth)
                                          : dot(write, static_cast<const float*>(operand) + token * p.depth, p.depth);
        if (p.rescale) change += shift[i] * p.lean[b * p.vocab + token];
        if (p.cap > 0) {
          const float before = raw[b * p.vocab + token];
          change = LOG2E * (logit_of(before + change, p.cap) - logit_of(before, p.cap));
        }
        p.out[i] = (change - p.out[i]) / LOG2E;
      }
    }
  }
}
