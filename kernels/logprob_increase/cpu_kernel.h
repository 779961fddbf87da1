#pragma once
#include <string>
#include <vector>

#include "problem.h"

namespace mllm {

// Fills p.out; `isa` is one of instruction_sets() of cpu/isa.h.
void increase(const Increase& p, const std::string& isa);

// Rate in flop/s of a loop of independent fused multiply-adds that never leaves the registers, on `threads`
// threads: the ceiling that the benchmarks compare with.
double fma_rate(int threads, const std::string& isa);

}  // namespace mllm
