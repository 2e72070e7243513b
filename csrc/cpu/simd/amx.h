// F32 of avx512_vnni.h at the level that multiplies tiles (AMX): of bf16 pairs, and of bytes.
#pragma once

#define LLMKERN_NS amx
#define LLMKERN_PAIR_DOT
#define LLMKERN_TILE_DOT

#include "cpu/simd/avx512_vnni.h"
