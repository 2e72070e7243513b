// Takes the place of the compiler's header for the levels above avx2, when LLMKERN_EMULATE builds those with the flags
// of avx2: the intrinsics that the kernels use become functions in plain C++, with the values that the manuals give.
// What does not compile here is not emulated yet: add it to avx512.h or amx.h.
#pragma once

#include_next <immintrin.h>

#include "amx.h"
#include "avx512.h"
