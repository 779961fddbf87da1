// Who is hidden from whom, and rows of the output. Included inside a namespace, once an instruction set, after
// cpu/lanes.h: no include guard.

typedef uint32_t bit_vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bit_vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Lanes whose keys, `key` and those after it, the row at `position` does not see: all ones there.
static inline ivec hidden(const mllm::Sight& sight, int64_t key, int64_t position, mllm::Bits closed) {
  ivec lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  const bit_vec bit = *reinterpret_cast<const bit_vec_unaligned*>(sight.bit.data() + key);
  const int32_t last = static_cast<int32_t>(position - key), first = static_cast<int32_t>(sight.first - key);
  return (lane > last) | (lane < first) | ((bit & closed) != 0);
}

// One row of the output and its log-sum-exp: `out` holds the values weighed by 2 ^ (score - peak), `sum` those weights'
// sum, 0 for a row that sees no key.
template <typename T>
static inline void write_row(const mllm::AttentionProblem& p, int64_t batch, int64_t head, int64_t row,
                             const float* out, float sum, float peak) {
  const bool seen = sum != 0;  // NaN too
  T* to = static_cast<T*>(p.out) + ((batch * p.rows + row) * p.heads + head) * p.width;
  if (seen) {
    store_scaled(out, 1.0f / sum, p.width, to);
  } else {
    std::fill_n(to, p.width, T(0));
  }
  if (p.lse)
    p.lse[(batch * p.heads + head) * p.rows + row] = seen ? (peak + std::log2(sum)) * 0.6931471805599453f : mllm::UNSET;
}
