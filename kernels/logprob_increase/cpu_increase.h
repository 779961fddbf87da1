// Increases from log-probabilities and writes: what stands around the log-sum-exp. Included inside a namespace, once an
// instruction set, after cpu/lanes.h: no include guard.


static inline float logit_of(float raw, float cap) { return cap * std::tanh(raw / cap); }

// From the log-sum-exp of one group to the increase: the explained word's own logit.
static void finish(const mllm::Increase& p, int64_t group, const void* operand, const float* writes,
                   const float* shift) {
  const int64_t b = p.source_of(group), token = p.tokens[b];
  if (token < 0) {  // no word, whose logit no write changes
    for (int64_t i = group * p.rows; i < (group + 1) * p.rows; ++i) p.out[i] = -p.out[i] / LOG2E;
    return;
  }
  for (int64_t i = group * p.rows; i < (group + 1) * p.rows; ++i) {
    const float* write = writes + i * p.depth;
    float change = p.operand_bfloat16 ? dot(write, static_cast<const uint16_t*>(operand) + token * p.depth, p.depth)
                                      : dot(write, static_cast<const float*>(operand) + token * p.depth, p.depth);
    if (p.rescale) change += shift[i] * p.lean[b * p.vocab + token];
    if (p.cap > 0) {
      const float before = p.raw[b * p.vocab + token];
      change = LOG2E * (logit_of(before + change, p.cap) - logit_of(before, p.cap));
    }
    p.out[i] = (change - p.out[i]) / LOG2E;
  }
}

// `log_sum_exp`: of this instruction set, or of another of the same processor.
static void increase(const mllm::Increase& p, void (*log_sum_exp)(const mllm::Problem&)) {
  const int64_t count = p.groups * p.rows;
  std::atomic<int64_t> next{0};
  // the sums work in powers of two; under a cap they need the increase itself, in nats
  const float unit = p.cap > 0 ? 1.0f : LOG2E;
  mllm::Floats writes(count * p.depth), shift(p.rescale ? count : 0);
  mllm::parallel(mllm::worthwhile_threads(p.threads, 4.0 * count * p.depth), [&](int) {
    for (int64_t g; (g = next++) < p.groups;)
      for (int64_t i = g * p.rows; i < (g + 1) * p.rows; ++i) {
        const float after = (p.scale[p.source_of(g)] + (p.rescale ? p.rescale[i] : 0.0f)) * unit;
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
  // many small products: a thread takes some of them; else all threads share each
  const double flops = 2.0 * together * p.rows * p.vocab * (p.depth + 8);
  const bool apart = mllm::worthwhile_threads(p.threads, flops) == 1;
  next = 0;
  mllm::parallel(apart ? mllm::worthwhile_threads(p.threads, flops * p.operands.size()) : 1, [&](int) {
    for (int64_t i; (i = next++) < static_cast<int64_t>(p.operands.size());) {
      const int64_t first = i * together;
      mllm::Problem q;
      q.writes = writes.data() + first * p.rows * p.depth;
      q.operand = p.operands[i];
      q.operand_bfloat16 = p.operand_bfloat16;
      q.source = p.source ? p.source + first : nullptr;
      q.first = first;
      q.base = p.log_probs;
      q.lean = p.rescale ? p.lean : nullptr;
      q.shift = p.rescale ? shift.data() + first * p.rows : nullptr;
      q.raw = p.raw;
      q.cap = p.cap;
      q.group_rows = p.rows;
      q.rows = together * p.rows;
      q.vocab = p.vocab;
      q.depth = p.depth;
      q.groups = together;
      q.out = p.out + first * p.rows;
      q.threads = apart ? 1 : p.threads;
      log_sum_exp(q);
      for (int64_t g = first; g < first + together; ++g) finish(p, g, p.operands[i], writes.data(), shift.data());
    }
  });
}
