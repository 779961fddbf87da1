#pragma once
#include <string>

#include "problem.h"

namespace mllm {

// Fills p.out, and p.lse and p.mass where they are given; `isa` is one of instruction_sets() of cpu/isa.h.
void attention(const AttentionProblem& p, const std::string& isa);

}  // namespace mllm
