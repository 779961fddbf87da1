// One call of knockout attention, as the kernels see it, and who sees whom in it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/aligned.h"
#include "../cpu/bfloat16.h"

namespace mllm {

struct Strides {  // in elements; the last dimension's is 1
  int64_t batch = 0, head = 0, row = 0;
};

struct AttentionProblem {
  const void *query = nullptr, *key = nullptr, *value = nullptr;
  bool bfloat16 = false;  // all three, and the output; else float32
  Strides query_strides, key_strides, value_strides;
  const uint8_t* segments = nullptr;  // [batch or 1, keys] or null
  int64_t segment_stride = 0;
  const uint32_t* table = nullptr;  // [32]
  const int32_t* start = nullptr;   // [batch] or null
  const float* sinks = nullptr;     // [heads] or null
  float scale = 1;
  float softcap = 0;  // 0 for none
  int64_t batch = 0, heads = 0, kv_heads = 0, rows = 0, keys = 0, width = 0;
  int64_t offset = 0;  // position of the first row; that of the last is keys - 1 or beyond
  void* out = nullptr;                  // [batch, rows, heads, width]
  float* lse = nullptr;                 // [batch, heads, rows] or null
  float* mass = nullptr;                // [batch, heads, keys] or null, zeros on entry
  const uint8_t* mass_rows = nullptr;   // [batch, rows], or null for all
  int threads = 1;

  int64_t group() const { return heads / kv_heads; }
  float log2_scale() const { return scale * 1.4426950408889634f; }
  float log2_softcap() const { return softcap * 1.4426950408889634f; }
};

// Bits of segments. A row is closed to the segments in its bits; a key is in one segment.
using Bits = uint32_t;

// The keys of one sequence: bit of each key's segment, the first real key, and which segments lie where.
struct Sight {
  static constexpr int GRAIN = 8;
  const uint8_t* ids = nullptr;
  const uint32_t* table = nullptr;
  int64_t first = 0, keys = 0, offset = 0;
  std::vector<Bits, CacheAligned<Bits>> bit;  // [keys + 64], 0 beyond the last
  std::vector<Bits> present;                  // of each GRAIN keys

  Sight(const AttentionProblem& p, int64_t b)
      : ids(p.segments ? p.segments + b * p.segment_stride : nullptr),
        table(p.table),
        first(p.start ? std::max<int64_t>(p.start[b], 0) : 0),
        keys(p.keys),
        offset(p.offset),
        bit(p.keys + 64, 0),
        present((p.keys + GRAIN - 1) / GRAIN, 0) {
    for (int64_t k = 0; k < keys; ++k) {
      if (ids && ids[k] > 31)
        throw std::invalid_argument("segments holds ids 0 to 31, got " + std::to_string(ids[k]));
      bit[k] = ids ? Bits(1) << ids[k] : 1;
      present[k / GRAIN] |= bit[k];
    }
  }

  // The last key that the row may see: rows after all keys see as much as the last position.
  int64_t position(int64_t row) const { return std::min(offset + row, keys - 1); }

  // Segments that the row does not see.
  Bits closed(int64_t row) const { return ids ? table[ids[offset + row]] : 0; }

  Bits present_in(int64_t from, int64_t to) const {
    Bits all = 0;
    for (int64_t g = from / GRAIN; g * GRAIN < std::min(to, keys); ++g) all |= present[g];
    return all;
  }
};

// How rows [row, row + count) see keys [from, to): not at all, all of them all, or each for itself.
enum class View { NONE, SOME, ALL };

struct RowsView {
  const Sight& sight;
  int64_t row, count;
  Bits closed_to_all = ~Bits(0), closed_to_some = 0;

  RowsView(const Sight& s, int64_t r, int64_t n) : sight(s), row(r), count(n) {
    for (int64_t i = r; i < r + n; ++i) closed_to_all &= s.closed(i), closed_to_some |= s.closed(i);
  }
  View of(int64_t from, int64_t to) const {
    const int64_t low = sight.position(row), high = sight.position(row + count - 1);
    if (from > high || std::min(to, sight.keys) <= sight.first) return View::NONE;
    const Bits here = sight.present_in(from, to);
    if (!(here & ~closed_to_all)) return View::NONE;
    return to - 1 > low || from < sight.first || to > sight.keys || here & closed_to_some ? View::SOME : View::ALL;
  }
};

// How the rows of each block see each chunk of keys: the same for all heads of a sequence.
struct Views {
  int64_t block, chunk, blocks, chunks;  // rows a block, keys a chunk, and how many of them
  std::vector<View> view;

  Views(const Sight& sight, int64_t rows, int64_t rows_a_block, int64_t keys_a_chunk)
      : block(rows_a_block),
        chunk(keys_a_chunk),
        blocks((rows + block - 1) / block),
        chunks((sight.keys + chunk - 1) / chunk),
        view(blocks * chunks) {
    for (int64_t b = 0; b < blocks; ++b) {
      const RowsView rows_view(sight, b * block, std::min(block, rows - b * block));
      for (int64_t c = 0; c < chunks; ++c) view[b * chunks + c] = rows_view.of(c * chunk, (c + 1) * chunk);
    }
  }
  View of(int64_t b, int64_t c) const { return view[b % blocks * chunks + c]; }
};

// A piece of work: row blocks [first, last) of the heads that share one key head, counted head by head.
struct AttentionTask {
  int64_t batch, kv_head, first, last;
};

// Tasks enough for the threads; more than one a key head only if there are too few of these.
inline std::vector<AttentionTask> attention_tasks(const AttentionProblem& p, int64_t blocks_a_head) {
  const int64_t units = p.batch * p.kv_heads, blocks = p.group() * blocks_a_head;
  const bool enough = units % p.threads == 0 || units > 4 * p.threads;
  const int64_t slices = enough ? 1 : std::min<int64_t>(blocks, (2 * p.threads + units - 1) / units);
  std::vector<AttentionTask> tasks;
  for (int64_t u = 0; u < units; ++u)
    for (int64_t s = 0; s < slices; ++s)
      tasks.push_back({u / p.kv_heads, u % p.kv_heads, blocks * s / slices, blocks * (s + 1) / slices});
  return tasks;
}

constexpr float UNSET = -std::numeric_limits<float>::infinity();  // the peak of a row that has seen no key

}  // namespace mllm
