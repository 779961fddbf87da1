// What cpu/each_isa.h compiles once an instruction set.
#include "cpu_tile.h"
#include "cpu_fma.h"
#include "../cpu/lanes.h"
#include "cpu_increase.h"
#include "cpu_spin.h"
