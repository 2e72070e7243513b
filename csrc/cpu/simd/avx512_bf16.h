// F32 of avx512_vnni.h at the level that adds products of bf16 pairs.
#pragma once

#define LLMKERN_NS avx512_bf16
#define LLMKERN_PAIR_DOT
#define LLMKERN_PAIR_STREAM

#include "cpu/simd/avx512_vnni.h"
#include "cpu/simd/products.h"
