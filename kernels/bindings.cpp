// The one extension module, mllm_fast.kernels._cpu. Arrays come as addresses: numpy has no bfloat16, and
// without torch's headers one build serves every torch. Shapes are checked by the op that calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cpu/isa.h"
#include "decoder_layers/cpu_kernel.h"
#include "skinny_linear/cpu_kernel.h"
#include "knockout_attention/cpu_kernel.h"
#include "logprob_increase/cpu_kernel.h"
#include "token_scores/cpu_kernel.h"
#include "weighted_values/cpu_kernel.h"

namespace py = pybind11;

template <typename T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Pair = std::array<uintptr_t, 2>;

static mllm::DecoderKeys decoder_keys(const std::vector<Pair>& layers, const std::array<int64_t, 3>& strides,
                                      const std::array<int64_t, 2>& sizes) {
  mllm::DecoderKeys keys;
  for (const auto& [key, value] : layers) keys.layers.push_back({pointer<void>(key), pointer<void>(value)});
  keys.strides = strides;
  keys.sizes = sizes;
  return keys;
}

struct Decoder {  // the weights of a decoder, for as long as they stay where they are
  mllm::DecoderSizes sizes;
  std::vector<mllm::DecoderLayer> layers;
  mllm::DecoderNorm final;
};

static void bind_decoder(py::module_& m) {
  using Norm = std::tuple<uintptr_t, float>;
  using Mask = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t>;
  using Keys = std::tuple<std::vector<Pair>, std::array<int64_t, 3>, std::array<int64_t, 2>>;
  using Part = std::tuple<Keys, uintptr_t, int64_t, std::vector<Mask>>;
  py::class_<Decoder>(m, "Decoder", "See decoder_layers/cpu_kernel.h.")
      .def(py::init([](std::array<int64_t, 5> sizes, std::array<bool, 2> kinds,
                       const std::vector<std::tuple<std::array<Norm, 4>, std::array<Pair, 7>, float>>& layers,
                       Norm final) {
             Decoder d;
             d.sizes = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                        kinds[0] ? mllm::Activation::GELU_TANH : mllm::Activation::SILU, kinds[1]};
             const auto norm = [](const Norm& n) {
               return mllm::DecoderNorm{pointer<const float>(std::get<0>(n)), std::get<1>(n)};
             };
             const auto linear = [](const Pair& l) {
               return mllm::DecoderLinear{pointer<const void>(l[0]), pointer<const float>(l[1])};
             };
             for (const auto& [norms, linears, scale] : layers)
               d.layers.push_back({norm(norms[0]), norm(norms[1]), norm(norms[2]), norm(norms[3]), linear(linears[0]),
                                   linear(linears[1]), linear(linears[2]), linear(linears[3]), linear(linears[4]),
                                   linear(linears[5]), linear(linears[6]), scale});
             d.final = norm(final);
             return d;
           }),
           py::arg("sizes"), py::arg("kinds"), py::arg("layers"), py::arg("final"),
           "sizes: hidden, heads, key heads, width, inner; kinds: whether gelu, whether bfloat16; layers: norms input, query, key, middle, linear layers query,"
           " key, value, output, gate, up, down, and the scale of the scores.")
      .def(
          "run",
          [](const Decoder& d, std::array<int64_t, 3> sizes, std::array<uintptr_t, 6> arrays,
             const Keys& store, uintptr_t places, const std::vector<Part>& parts, int64_t recorded, std::array<uintptr_t, 4> records, int threads,
             const std::string& isa) {
            mllm::DecoderPass p;
            p.rows = sizes[0];
            p.rotary = sizes[1];
            p.x = pointer<float>(arrays[0]);
            p.cos = pointer<const float>(arrays[1]);
            p.sin = pointer<const float>(arrays[2]);
            p.normed = pointer<float>(arrays[3]);
            p.needed = sizes[2];
            p.needed_rows = pointer<const int64_t>(arrays[4]);
            p.last = pointer<float>(arrays[5]);
            p.store = std::apply(decoder_keys, store);
            p.places = pointer<const int64_t>(places);
            for (const auto& [keys, address, count, masks] : parts) {
              mllm::DecoderPart part;
              part.keys = std::apply(decoder_keys, keys);
              const auto* entries = pointer<const mllm::DecoderEntry>(address);
              part.entries.assign(entries, entries + count);
              for (const auto& [segments, keys_seen, stride, table] : masks)
                part.masks.push_back(
                    {pointer<const uint8_t>(segments), keys_seen, stride, pointer<const uint32_t>(table)});
              p.parts.push_back(std::move(part));
            }
            p.final = d.final;
            p.recorded = recorded;
            p.recorded_rows = pointer<const int64_t>(records[0]);
            p.residual = pointer<float>(records[1]);
            p.queries = pointer<float>(records[2]);
            p.outputs = pointer<float>(records[3]);
            p.threads = threads;
            py::gil_scoped_release release;
            mllm::decoder_layers(d.sizes, d.layers, p, isa);
          },
          py::arg("sizes"), py::arg("arrays"), py::arg("store"), py::arg("places"), py::arg("parts"), py::arg("recorded"), py::arg("records"), py::arg("threads"), py::arg("isa"),
          "sizes: rows, rotary, needed; arrays: x, cos, sin, normed, needed rows, last; store and each part: keys and values of every"
          " layer, their strides, slots and positions; each part: entries and how many, segments, how many keys they name,"
          " their stride and table of every layer; records: which rows, residual, queries, outputs.");
}

static void bind_token_scorer(py::module_& m) {
  py::class_<mllm::TokenScorer>(m, "TokenScorer", "See token_scores/cpu_kernel.h.")
      .def(py::init([](const std::array<int64_t, 5>& sizes, float eps, Pair unembedding,
                       const std::vector<uintptr_t>& outputs) {
             std::vector<const float*> each;
             for (const uintptr_t one : outputs) each.push_back(pointer<const float>(one));
             return mllm::token_scorer({sizes.begin(), sizes.end()}, eps, pointer<const float>(unembedding[0]),
                                       pointer<const float>(unembedding[1]), each);
           }),
           py::call_guard<py::gil_scoped_release>(), py::arg("sizes"), py::arg("eps"), py::arg("unembedding"),
           py::arg("outputs"), "sizes: layers, heads, width, hidden, vocabulary; unembedding: weight, gain.")
      .def("padded", &mllm::TokenScorer::padded)
      .def(
          "heads",
          [](const mllm::TokenScorer& s, std::array<uintptr_t, 3> rows, int64_t token, Pair results,
             const std::string& isa) {
            mllm::score_heads(s, {pointer<const float>(rows[0]), pointer<const float>(rows[1]),
                                  pointer<const float>(rows[2]), token, pointer<float>(results[0]),
                                  pointer<float>(results[1])}, isa);
          },
          py::call_guard<py::gil_scoped_release>(), py::arg("rows"), py::arg("token"), py::arg("results"),
          py::arg("isa"), "rows: residual, output, final; results: logs, scores.")
      .def(
          "positions",
          [](const mllm::TokenScorer& s, Pair rows, int64_t token, const std::vector<int64_t>& heads, uintptr_t values,
             int64_t positions, uintptr_t scores, const std::string& isa) {
            mllm::score_positions(s, {pointer<const float>(rows[0]), pointer<const float>(rows[1]), token, heads,
                                      pointer<const float>(values), positions, pointer<float>(scores)}, isa);
          },
          py::call_guard<py::gil_scoped_release>(), py::arg("rows"), py::arg("token"), py::arg("heads"),
          py::arg("values"), py::arg("positions"), py::arg("scores"), py::arg("isa"), "rows: final, logs.");
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of mllm-fast. Addresses are those of contiguous host memory.";
  m.def("instruction_sets", &mllm::instruction_sets, "Instruction sets usable here, best first.");
  m.def(
      "increase",
      [](uintptr_t writes, const std::vector<uintptr_t>& operands, bool bfloat16, std::array<uintptr_t, 2> names,
         std::array<uintptr_t, 3> scales, std::array<uintptr_t, 3> logits, float cap, std::array<int64_t, 5> sizes,
         uintptr_t out, int threads, const std::string& isa) {
        mllm::Increase p;
        p.writes = pointer<float>(writes);
        for (const uintptr_t one : operands) p.operands.push_back(pointer<const void>(one));
        p.operand_bfloat16 = bfloat16;
        p.source = pointer<const int64_t>(names[0]);
        p.tokens = pointer<const int64_t>(names[1]);
        p.scale = pointer<float>(scales[0]);
        p.rescale = pointer<float>(scales[1]);
        p.gain = pointer<float>(scales[2]);
        p.log_probs = pointer<float>(logits[0]);
        p.lean = pointer<float>(logits[1]);
        p.raw = pointer<float>(logits[2]);
        p.cap = cap;
        p.sources = sizes[0];
        p.groups = sizes[1];
        p.rows = sizes[2];
        p.vocab = sizes[3];
        p.depth = sizes[4];
        p.out = pointer<float>(out);
        p.threads = threads;
        mllm::increase(p, isa);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("writes"), py::arg("operands"), py::arg("bfloat16"),
      py::arg("names"), py::arg("scales"), py::arg("logits"), py::arg("cap"), py::arg("sizes"), py::arg("out"),
      py::arg("threads"), py::arg("isa"),
      "Fills `out`, a number a row; one operand for all groups, or one for each. names: sources, tokens; scales: scale,"
      " rescale, gain; logits: log-probabilities, lean, raw; sizes: sources, groups, rows a group, vocabulary, depth. See"
      " logprob_increase/problem.h.");
  m.def(
      "attention",
      [](std::array<uintptr_t, 3> operands, bool bfloat16, std::array<std::array<int64_t, 4>, 3> strides,
         std::array<uintptr_t, 4> mask, int64_t segment_stride, std::array<float, 2> scoring, std::array<int64_t, 7> sizes,
         std::array<uintptr_t, 4> results, int threads, const std::string& isa) {
        mllm::AttentionProblem p;
        p.query = pointer<const void>(operands[0]);
        p.key = pointer<const void>(operands[1]);
        p.value = pointer<const void>(operands[2]);
        p.bfloat16 = bfloat16;
        auto of = [](const std::array<int64_t, 4>& s) { return mllm::Strides{s[0], s[1], s[2]}; };
        p.query_strides = of(strides[0]);
        p.key_strides = of(strides[1]);
        p.value_strides = of(strides[2]);
        p.segments = pointer<const uint8_t>(mask[0]);
        p.segment_stride = segment_stride;
        p.table = pointer<const uint32_t>(mask[1]);
        p.start = pointer<const int32_t>(mask[2]);
        p.sinks = pointer<const float>(mask[3]);
        p.scale = scoring[0];
        p.softcap = scoring[1];
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
      py::arg("mask"), py::arg("segment_stride"), py::arg("scoring"), py::arg("sizes"), py::arg("results"),
      py::arg("threads"), py::arg("isa"),
      "Operands query, key, value and their strides of batch, head, row; mask segments, table, start, sinks; scoring"
      " scale and soft cap, 0 for none; sizes batch,"
      " heads, key heads, rows, keys, width and the first row's position; results output, lse, mass and the rows it counts. See"
      " knockout_attention/problem.h.");
  m.def(
      "weighted_values",
      [](uintptr_t query,
         const std::vector<std::tuple<std::array<uintptr_t, 3>, std::array<int64_t, 4>, int64_t, float>>& layers,
         const std::vector<std::array<int64_t, 3>>& heads, bool bfloat16, std::array<int64_t, 2> sizes, uintptr_t out,
         int threads, const std::string& isa) {
        mllm::WeightedValues p;
        const int64_t size = bfloat16 ? 2 : 4;
        for (const auto& [layer, row, head] : heads) {
          const auto& [bases, strides, group, scale] = layers.at(layer);
          p.heads.push_back({pointer<const char>(query) + row * sizes[1] * size,
                             pointer<const char>(bases[0]) + head / group * strides[0] * size,
                             pointer<const char>(bases[1]) + head / group * strides[2] * size, strides[1], strides[3],
                             pointer<const uint8_t>(bases[2]), scale});
        }
        p.bfloat16 = bfloat16;
        p.positions = sizes[0];
        p.width = sizes[1];
        p.out = pointer<float>(out);
        p.threads = threads;
        mllm::weighted_values(p, isa);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("query"), py::arg("layers"), py::arg("heads"),
      py::arg("bfloat16"), py::arg("sizes"), py::arg("out"), py::arg("threads"), py::arg("isa"),
      "layers: addresses of keys, values and seen, strides of head and position of keys and of values, query heads a key"
      " head, scale. heads: index into layers, row of query, head. sizes: positions, width. See"
      " weighted_values/cpu_kernel.h.");
  m.def(
      "skinny_linear",
      [](std::array<uintptr_t, 4> arrays, std::array<bool, 2> bfloat16, std::array<int64_t, 3> sizes, int threads,
         const std::string& isa) {
        mllm::SkinnyLinear p;
        p.x = pointer<const void>(arrays[0]);
        p.weight = pointer<const void>(arrays[1]);
        p.bias = pointer<const void>(arrays[2]);
        p.out = pointer<void>(arrays[3]);
        p.rows_bfloat16 = bfloat16[0];
        p.weight_bfloat16 = bfloat16[1];
        p.rows = sizes[0];
        p.columns = sizes[1];
        p.depth = sizes[2];
        p.threads = threads;
        mllm::skinny_linear(p, isa);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("arrays"), py::arg("bfloat16"), py::arg("sizes"),
      py::arg("threads"), py::arg("isa"),
      "arrays: x, weight, bias, out; bfloat16: x and out, weight and bias; sizes: rows, columns, depth. See"
      " skinny_linear/cpu_kernel.h.");
  bind_decoder(m);
  bind_token_scorer(m);
  m.def("fma_rate", &mllm::fma_rate, py::call_guard<py::gil_scoped_release>(), py::arg("threads"), py::arg("isa"),
        "flop/s of a register-only loop of fused multiply-adds.");
}
