// The layers of a decoder over a few rows; see decoder_layers/__init__.py for the definition.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace mllm {

struct DecoderNorm {  // a root mean square norm; gain null: none
  const float* gain = nullptr;
  float eps = 0;
};

struct DecoderLinear {
  const void* weight = nullptr;  // [out, in], of the decoder's type
  const float* bias = nullptr;   // [out] or null
};

struct DecoderLayer {
  DecoderNorm input, query_norm, key_norm, middle;
  DecoderLinear query, key, value, output, gate, up, down;
  float scale = 1;  // of the scores
};

enum class Activation { SILU, GELU_TANH };

struct DecoderSizes {
  int64_t hidden = 0, heads = 0, kv_heads = 0, width = 0, inner = 0;
  Activation activation = Activation::SILU;
  bool bfloat16 = false;  // weights, keys and values; all else is float

  int64_t group() const { return heads / kv_heads; }
  int64_t queries() const { return heads * width; }
  int64_t keys() const { return kv_heads * width; }
};

// Arrays of keys or values of all layers, [slots, heads, positions, width], with the strides of the first three.
struct DecoderKeys {
  std::vector<std::array<void*, 2>> layers;  // keys, values
  std::array<int64_t, 3> strides{};
  std::array<int64_t, 2> sizes{};  // slots, positions
};

// A row that attends to keys [begin, end) of a slot; `place` is its own position, whose segment says what is closed to it.
struct DecoderEntry {
  int64_t row, slot, begin, end, place;
};

struct DecoderMask {  // of one layer
  const uint8_t* segments = nullptr;  // [slots or 1, keys] or null
  int64_t keys = 0, stride = 0;       // stride: from one slot to the next
  const uint32_t* table = nullptr;    // [32]
};

struct DecoderPart {
  DecoderKeys keys;
  std::vector<DecoderEntry> entries;  // those of a slot follow each other
  std::vector<DecoderMask> masks;     // of every layer, or empty
};

struct DecoderPass {
  int64_t rows = 0, rotary = 0;                  // rotary: how many channels of a head turn
  float* x = nullptr;                            // [rows, hidden], in and out
  const float *cos = nullptr, *sin = nullptr;    // [rows, rotary]
  DecoderKeys store;                             // where the rows' own keys and values go
  const int64_t* places = nullptr;               // [rows, 2]: slot and position there
  std::vector<DecoderPart> parts;
  DecoderNorm final;
  float* normed = nullptr;                       // [rows or needed, hidden], behind the final norm
  int64_t needed = -1;                           // rows whose result is read, or -1 for all
  const int64_t* needed_rows = nullptr;          // [needed]
  float* last = nullptr;                         // [needed, hidden], what the last layer gives of these
  int64_t recorded = 0;                          // rows whose vectors are kept, needed ones
  const int64_t* recorded_rows = nullptr;        // [recorded]
  float *residual = nullptr, *queries = nullptr, *outputs = nullptr;  // [recorded, layers, ...]
  int threads = 1;
};

// Fills p.x and p.normed, the store, and what is recorded; `isa` is one of instruction_sets() of cpu/isa.h.
void decoder_layers(const DecoderSizes& sizes, const std::vector<DecoderLayer>& layers, const DecoderPass& p,
                    const std::string& isa);

}  // namespace mllm
