// F32 of neon_dotprod.h at the level that adds products of byte matrices.
#pragma once

#define LLMKERN_NS neon_i8mm

#include "cpu/simd/neon_dotprod.h"
