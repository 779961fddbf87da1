// What cpu/each_isa.h compiles for the matrix tiles.
#include "cpu_tile.h"
#include "cpu_amx.h"
