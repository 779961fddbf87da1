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

// c tanh(x / c) with c = `cap`: for a soft cap. Near 0 by a polynomial, since 1 - 2 / (e^2u + 1) would lose the digits.
static inline vec capped(vec x, float cap) {
  const vec u = x * (1.0f / cap), square = u * u;
  vec near = splat(-0.005659984890371561f);  // minimax for tanh(u) / u up to 0.625, 4e-9 relative
  near = near * square + 0.02059098519384861f;
  near = near * square - 0.05372106656432152f;
  near = near * square + 0.13331127166748047f;
  near = near * square - 0.3333325982093811f;
  near = near * square * u + u;
  const vec size = u < (vec){} ? -u : u, bounded = size > splat(10.0f) ? splat(10.0f) : size;  // NaN stays NaN
  const vec far = 1.0f - 2.0f / (exp2(bounded * 2.8853900817779268f) + 1.0f);
  return (size < splat(0.625f) ? near : (u < (vec){} ? -far : far)) * cap;
}

// One row of the output and its log-sum-exp: `out` holds the values weighed by 2 ^ (score - peak), `sum` those weights'
// sum, 0 for a row that sees no key. Returns the factor of the weights, not to be used for such a row.
template <typename T>
static inline float write_row(const mllm::AttentionProblem& p, int64_t batch, int64_t head, int64_t row,
                             const float* out, float sum, float peak) {
  const bool seen = sum != 0;  // NaN too
  const float sink = p.sinks ? p.sinks[head] * 1.4426950408889634f : mllm::UNSET;
  float scale = 1;  // of the weights, where a sink is above them
  if (p.sinks && seen && sink > peak) {
    scale = std::exp2(peak - sink);
    sum = sum * scale + 1.0f;
    peak = sink;
  } else if (p.sinks && seen) {
    sum += std::exp2(sink - peak);
  }
  T* to = static_cast<T*>(p.out) + ((batch * p.rows + row) * p.heads + head) * p.width;
  if (seen) {
    store_scaled(out, scale / sum, p.width, to);
  } else {
    std::fill_n(to, p.width, T(0));
  }
  if (p.lse)
    p.lse[(batch * p.heads + head) * p.rows + row] = (seen ? peak + std::log2(sum) : sink) * 0.6931471805599453f;
  return scale / sum;
}
