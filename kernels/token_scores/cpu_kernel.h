// The increases of one explained token; see token_scores/__init__.py for the definition.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../cpu/aligned.h"

namespace mllm {

constexpr int64_t SCORED_LANES = 16;  // words are padded to a multiple

struct TokenScorer {
  int64_t layers = 0, heads = 0, width = 0, hidden = 0, vocab = 0;
  float eps = 0;
  Floats words;      // (W_U diag g)^T, [hidden, padded]: words lie in lanes, so that no sum runs across them
  Floats operators;  // (W_U diag g O_j)^T of every head, [layers * heads, width, padded]

  int64_t padded() const { return (vocab + SCORED_LANES - 1) / SCORED_LANES * SCORED_LANES; }
};

// weight [vocab, hidden], gain [hidden], outputs: one [hidden, heads * width] a layer.
TokenScorer token_scorer(const std::vector<int64_t>& sizes, float eps, const float* weight, const float* gain,
                         const std::vector<const float*>& outputs);

struct ScoredToken {
  const float *residual = nullptr, *output = nullptr, *final = nullptr;  // [layers, hidden], [layers, heads * width], [hidden]
  int64_t token = 0;
  float* logs = nullptr;    // [layers, padded]: log2 of the probabilities at each layer's input
  float* scores = nullptr;  // [layers, heads]
};

void score_heads(const TokenScorer& s, const ScoredToken& p, const std::string& isa);

struct ScoredPositions {
  const float *final = nullptr, *logs = nullptr;
  int64_t token = 0;
  std::vector<int64_t> heads;           // layer * heads + head
  const float* values = nullptr;        // [heads, positions, width]: alpha v
  int64_t positions = 0;
  float* scores = nullptr;              // [heads, positions]
};

void score_positions(const TokenScorer& s, const ScoredPositions& p, const std::string& isa);

}  // namespace mllm
