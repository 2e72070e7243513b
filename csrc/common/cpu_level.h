// The only place that asks the machine what it can do. Compiled without any level's flags.
#pragma once

#include <vector>

namespace llmkern {

// Instruction sets that both the processor and the operating system (saved registers) support.
struct Cpu {
    bool avx2, fma, f16c, bmi2;
    bool avx512f, avx512bw, avx512dq, avx512vl, avx512vnni, avx512vbmi, avx512vbmi2, avx512bf16;
    bool amx_tile, amx_int8, amx_bf16;
    bool crc32, lse, rdm, fp16, dotprod, i8mm;  // of AArch64; the first three are ARMv8.1's
};

struct Level {
    const char* name;
    bool available;
    const char* flags;
};

// The rows of levels.def in order, tested once.
const std::vector<Level>& levels();

// Whether vdpbf16ps, where there is one, is as fast as an fp32 FMA, for twice the work. AMD's is; Intel's runs at a
// quarter of that rate, so that fp32 sums are twice as fast there.
bool fast_bf16_products();

}  // namespace llmkern
