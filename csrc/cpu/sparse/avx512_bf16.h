// Kept values as in avx512_vnni.h. See sparse.h for the interface.
#pragma once

#include "cpu/simd/avx512_bf16.h"

#include "cpu/sparse/avx512_vnni.h"
