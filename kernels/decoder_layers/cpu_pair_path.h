// What cpu/each_isa.h compiles for products of bfloat16 in pairs.
#define MLLM_PAIRS 1
#include "cpu_path.h"
#undef MLLM_PAIRS
