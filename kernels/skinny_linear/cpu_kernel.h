#pragma once
#include <cstdint>
#include <string>

namespace mllm {

// out = x weight^T + bias of a few rows; see skinny_linear/__init__.py.
struct SkinnyLinear {
  const void *x = nullptr, *weight = nullptr;  // [rows, depth], [columns, depth]
  const void* bias = nullptr;                  // [columns] or null
  void* out = nullptr;                         // [rows, columns]
  bool rows_bfloat16 = false;                  // x and out; else float32
  bool weight_bfloat16 = false;                // weight and bias; at least as narrow as the rows
  int64_t rows = 0, columns = 0, depth = 0;
  int threads = 1;
};

// Fills p.out; `isa` is one of instruction_sets() of cpu/isa.h.
void skinny_linear(const SkinnyLinear& p, const std::string& isa);

}  // namespace mllm
