// What this machine can do at most, for `llmkern bench`: loops of independent multiply-adds on registers, and plain
// reading. No kernel can be faster, and how near one comes says what is left to gain.
#pragma once

#include <cstdint>

namespace llmkern {

// By the type of the factors. Sums are fp32 for the first two, int32 for the third.
enum class Factors { FP32, BF16, INT8 };

// multiply_add: does `rounds` rounds in every thread and returns the operations done by all, a multiplication and an
// addition counting two; 0 where the level has no instruction for these factors.
// read: reads [data, data + bytes) once; every task reads `streams` places in turn and prefetches `ahead` bytes.
#define LLMKERN_PEAKS(level)                                                                 \
    namespace level {                                                                        \
    double multiply_add(Factors factors, int64_t rounds, int threads);                       \
    void read(const void* data, int64_t bytes, int64_t streams, int64_t ahead, int threads); \
    }
#include "cpu/peaks/peaks.def"
#undef LLMKERN_PEAKS

}  // namespace llmkern
