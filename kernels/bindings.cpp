// The one extension module, mllm_fast.kernels._cpu. Arrays come as addresses: numpy has no bfloat16, and
// without torch's headers one build serves every torch. Shapes are checked by the op that calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
      [](uintptr_t writes, uintptr_t operand, bool bfloat16, uintptr_t group_start, uintptr_t base, uintptr_t lean,
         uintptr_t shift, uintptr_t raw, float cap, int64_t rows, int64_t vocab, int64_t depth, int64_t groups,
         uintptr_t out, int threads, const std::string& isa) {
        mllm::Problem p;
        p.writes = pointer<const float>(writes);
        p.operand = pointer<const void>(operand);
        p.operand_bfloat16 = bfloat16;
        p.group_start = pointer<const int64_t>(group_start);
        p.base = pointer<const float>(base);
        p.lean = pointer<const float>(lean);
        p.shift = pointer<const float>(shift);
        p.raw = pointer<const float>(raw);
        p.cap = cap;
        p.rows = rows;
        p.vocab = vocab;
        p.depth = depth;
        p.groups = groups;
        p.out = pointer<float>(out);
        p.threads = threads;
        mllm::log_sum_exp(p, isa);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("writes"), py::arg("operand"), py::arg("bfloat16"),
      py::arg("group_start"), py::arg("base"), py::arg("lean"), py::arg("shift"), py::arg("raw"), py::arg("cap"),
      py::arg("rows"), py::arg("vocab"), py::arg("depth"), py::arg("groups"), py::arg("out"), py::arg("threads"),
      py::arg("isa"), "Fills `out`; see logprob_increase/problem.h.");
  m.def("fma_rate", &mllm::fma_rate, py::call_guard<py::gil_scoped_release>(), py::arg("threads"), py::arg("isa"),
        "flop/s of a register-only loop of fused multiply-adds.");
}
