// The arrays between the phases of a pass, and who attends to what in it. Both are the same for every instruction set.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/aligned.h"
#include "cpu_kernel.h"

namespace mllm {

// Rows as the products take them: blocks of up to `most` rows, each [depth / lanes][rows][lanes].
struct RowBlocks {
  int64_t rows, count;

  RowBlocks(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t first(int64_t block) const { return rows * block / count; }
  int64_t size(int64_t block) const { return first(block + 1) - first(block); }
};

// Some rows of one slot, against one key head.
struct AttentionItem {
  int64_t part, first, count;  // entries [first, first + count) of the part
  int64_t begin, end;          // the keys that any of them sees
};

struct DecoderRoom {
  Floats normed, qkv, attended, inner;   // packed [rows, hidden]; [rows, ...]; packed [rows, queries]; packed [rows, inner]
  Floats partial, lse;                   // [entries, queries], [entries, heads], parts one after another
  std::vector<int64_t> entry_of, first;  // the entries of each row, [entries], from first[row]
  std::vector<int64_t> before;           // entries before each part
  std::vector<AttentionItem> items;
  std::vector<int64_t> record_of;        // of each row, or -1
  std::vector<Floats> scratch;           // a thread's own

  // What would be read or written outside of the arrays.
  static void check(const DecoderPass& p) {
    for (int64_t r = 0; r < p.rows; ++r) {
      const auto& [slots, positions] = p.store.sizes;
      const int64_t slot = p.places[2 * r], position = p.places[2 * r + 1];
      if (slot < 0 || slot >= slots || position < 0 || position >= positions)
        throw std::invalid_argument("places name a slot and a position that are there, got (" + std::to_string(slot) +
                                    ", " + std::to_string(position) + ")");
    }
    for (const auto& part : p.parts) {
      const auto& [slots, positions] = part.keys.sizes;
      int64_t masked = positions;
      for (const auto& mask : part.masks)
        if (mask.segments) masked = std::min(masked, mask.keys);
      for (const auto& e : part.entries)
        if (e.row < 0 || e.row >= p.rows || e.slot < 0 || e.slot >= slots || e.begin < 0 || e.begin > e.end ||
            e.end > masked || (!part.masks.empty() && (e.place < 0 || e.place >= masked)))
          throw std::invalid_argument("entries name a row, a slot and keys that are there, got (" +
                                      std::to_string(e.row) + ", " + std::to_string(e.slot) + ", " +
                                      std::to_string(e.begin) + ", " + std::to_string(e.end) + ", " +
                                      std::to_string(e.place) + ")");
    }
  }

  // `together`: the most rows of an item.
  void prepare(const DecoderSizes& sizes, const DecoderPass& p, int64_t together) {
    normed.resize(p.rows * sizes.hidden);
    qkv.resize(p.rows * (sizes.queries() + 2 * sizes.keys()));
    attended.resize(p.rows * sizes.queries());
    inner.resize(p.rows * sizes.inner);
    scratch.resize(std::max<size_t>(scratch.size(), p.threads));
    record_of.assign(p.rows, -1);
    for (int64_t i = 0; i < p.recorded; ++i) record_of[p.recorded_rows[i]] = i;
    items.clear();
    before.assign(1, 0);
    for (size_t i = 0; i < p.parts.size(); ++i) {
      const auto& entries = p.parts[i].entries;
      const int64_t count = entries.size();
      for (int64_t e = 0; e < count;) {
        AttentionItem item{static_cast<int64_t>(i), e, 0, entries[e].begin, entries[e].end};
        for (; e < count && item.count < together && entries[e].slot == entries[item.first].slot; ++e, ++item.count) {
          item.begin = std::min(item.begin, entries[e].begin);
          item.end = std::max(item.end, entries[e].end);
        }
        items.push_back(item);
      }
      before.push_back(before.back() + count);
    }
    partial.resize(before.back() * sizes.queries());
    lse.resize(before.back() * sizes.heads);
    first.assign(p.rows + 1, 0);
    for (const auto& part : p.parts)
      for (const auto& entry : part.entries) ++first[entry.row + 1];
    for (int64_t r = 0; r < p.rows; ++r) first[r + 1] += first[r];
    entry_of.resize(before.back());
    std::vector<int64_t> at(first.begin(), first.end() - 1);
    for (size_t i = 0; i < p.parts.size(); ++i)
      for (size_t e = 0; e < p.parts[i].entries.size(); ++e)
        entry_of[at[p.parts[i].entries[e].row]++] = before[i] + e;
  }
};

// What is left of a pass once the last layer has stored the keys and values of all rows: that of the needed rows.
struct NeededPass {
  DecoderPass pass;
  std::vector<int64_t> recorded;

  explicit NeededPass(const DecoderPass& p) : pass(p) {
    std::vector<int64_t> index(p.rows, -1);
    for (int64_t i = 0; i < p.needed; ++i) index[p.needed_rows[i]] = i;
    for (int64_t i = 0; i < p.recorded; ++i) recorded.push_back(index[p.recorded_rows[i]]);
    for (auto& part : pass.parts) {
      std::vector<DecoderEntry> few;
      for (auto entry : part.entries)
        if ((entry.row = index[entry.row]) >= 0) few.push_back(entry);
      part.entries = std::move(few);
    }
    pass.rows = p.needed;
    pass.x = p.last;
    pass.recorded_rows = recorded.data();
  }
};

}  // namespace mllm
