// Compiles MLLM_PATH once an instruction set, each in a namespace of its own; MLLM_PAIR_PATH and MLLM_TILE_PATH, where
// there are such, once for products of bfloat16 in pairs and for the matrix tiles. Not with -march: the module must
// load anywhere, and the choice is made at run time.
// ROWS * VECS accumulators and VECS operands fit the registers. Needs cpu/isa.h; no include guard.

namespace plain {
namespace {
constexpr int ROWS = 4, VECS = 2;
#define LANES 4
#include "vector.h"
#include MLLM_PATH
#undef LANES
}  // namespace
}  // namespace plain

#if defined(MLLM_X86)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
namespace {
constexpr int ROWS = 4, VECS = 3;
#define LANES 8
#include "vector.h"
#include MLLM_PATH
#undef LANES
}  // namespace
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
namespace avx512 {
namespace {
constexpr int ROWS = 8, VECS = 3;
#define LANES 16
#include "vector.h"
#include MLLM_PATH
#undef LANES
}  // namespace
}  // namespace avx512
#pragma GCC pop_options
#endif

#if defined(MLLM_X86_BF16) && defined(MLLM_PAIR_PATH)
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
namespace avx512_bf16 {
namespace {
constexpr int ROWS = 8, VECS = 3;
#define LANES 16
#include "vector.h"
#include MLLM_PAIR_PATH
#undef LANES
}  // namespace
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

#if defined(MLLM_AMX) && defined(MLLM_TILE_PATH)
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
namespace amx {
namespace {
#define LANES 16
#include "vector.h"
#include "tiles.h"
#include MLLM_TILE_PATH
#undef LANES
}  // namespace
}  // namespace amx
#pragma GCC pop_options
#endif
