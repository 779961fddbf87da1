// The one extension module, mllm_fast.kernels._cpu. Arrays come as addresses: numpy has no bfloat16, and
// without torch's headers one build serves every torch. Shapes are checked by the op that calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/isa.h"
#include "knockout_attention/cpu_kernel.h"
#include "logprob_increase/cpu_kernel.h"

namespace py = pybind11;

template <typename T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of mllm-fast. Addresses are those of contiguous host memory.";
  m.def("instruction_sets", &mllm::instruction_sets, "Instruction sets usable here, best first.");
  m.def(
      "log_sum_exp",
      [](uintptr_t writes, std::vector<uintptr_t> operands, bool bfloat16, uintptr_t base, uintptr_t lean,
         uintptr_t shift, uintptr_t raw, float cap, int64_t rows, int64_t vocab, int64_t depth, int64_t groups,
         uintptr_t out, int threads, const std::string& isa) {
        const int64_t together = operands.size() == 1 ? groups : 1;  // groups of one operand
        for (size_t i = 0; i < operands.size(); ++i) {
          auto from = [&](uintptr_t array, int64_t each) {
            return array ? pointer<float>(array) + i * each : nullptr;
          };
          mllm::Problem p;
          p.writes = from(writes, rows * depth);
          p.operand = pointer<const void>(operands[i]);
          p.operand_bfloat16 = bfloat16;
          p.base = from(base, vocab);
          p.lean = from(lean, vocab);
          p.shift = from(shift, rows);
          p.raw = from(raw, vocab);
          p.cap = cap;
          p.group_rows = rows;
          p.rows = together * rows;
          p.vocab = vocab;
          p.depth = depth;
          p.groups = together;
          p.out = from(out, rows);
          p.threads = threads;
          mllm::log_sum_exp(p, isa);
        }
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("writes"), py::arg("operands"), py::arg("bfloat16"),
      py::arg("base"), py::arg("lean"), py::arg("shift"), py::arg("raw"), py::arg("cap"),
      py::arg("rows"), py::arg("vocab"), py::arg("depth"), py::arg("groups"), py::arg("out"), py::arg("threads"),
      py::arg("isa"),
      "Fills `out`, `rows` numbers a group; one operand for all groups, or one for each. See"
      " logprob_increase/problem.h.");
  m.def(
      "attention",
      [](std::array<uintptr_t, 3> operands, bool bfloat16, std::array<std::array<int64_t, 3>, 3> strides,
         std::array<uintptr_t, 3> mask, int64_t segment_stride, float scale, std::array<int64_t, 7> sizes,
         std::array<uintptr_t, 4> results, int threads, const std::string& isa) {
        mllm::AttentionProblem p;
        p.query = pointer<const void>(operands[0]);
        p.key = pointer<const void>(operands[1]);
        p.value = pointer<const void>(operands[2]);
        p.bfloat16 = bfloat16;
        auto of = [](const std::array<int64_t, 3>& s) { return mllm::Strides{s[0], s[1], s[2]}; };
        p.query_strides = of(strides[0]);
        p.key_strides = of(strides[1]);
        p.value_strides = of(strides[2]);
        p.segments = pointer<const uint8_t>(mask[0]);
        p.segment_stride = segment_stride;
        p.table = pointer<const uint32_t>(mask[1]);
        p.start = pointer<const int32_t>(mask[2]);
        p.scale = scale;
        p.batch = sizes[0];
        p.heads = sizes[1];
        p.kv_heads = sizes[2];
        p.rows = sizes[3];
        p.keys = sizes[4];
        p.width = sizes[5];
        p.offset = sizes[6];
        p.out = pointer<void>(results[0]);
        p.lse = pointer<float>(results[1]);
        p.mass = pointer<float>(results[2]);
        p.mass_rows = pointer<const uint8_t>(results[3]);
        p.threads = threads;
        mllm::attention(p, isa);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("operands"), py::arg("bfloat16"), py::arg("strides"),
      py::arg("mask"), py::arg("segment_stride"), py::arg("scale"), py::arg("sizes"), py::arg("results"),
      py::arg("threads"), py::arg("isa"),
      "Operands query, key, value and their strides of batch, head, row; mask segments, table, start; sizes batch,"
      " heads, key heads, rows, keys, width and the first row's position; results output, lse, mass and the rows it counts. See"
      " knockout_attention/problem.h.");
  m.def("fma_rate", &mllm::fma_rate, py::call_guard<py::gil_scoped_release>(), py::arg("threads"), py::arg("isa"),
        "flop/s of a register-only loop of fused multiply-adds.");
}
