// Division by a number that is the same for a whole launch, as a multiplication and a shift.
#pragma once

#include "cuda/common/instructions.h"

namespace llmkern::cuda {

// n / divisor for 0 <= n < 2^31: with 2^(shift - 1) < divisor <= 2^shift, n * ceil(2^(31 + shift) / divisor) is too
// large by less than the distance to the next multiple (Granlund and Montgomery 1994, theorem 4.2).
struct Divisor {
    uint32_t divisor, multiplier, shift;

    static Divisor of(uint32_t divisor) {
        uint32_t shift = 0;
        while ((uint64_t(1) << shift) < divisor) shift++;
        const uint64_t power = uint64_t(1) << (31 + shift);
        return {divisor, uint32_t((power + divisor - 1) / divisor), shift};
    }

    LLMKERN_DEVICE int divide(int n) const {
        return shift ? int(multiply_high(uint32_t(n), multiplier) >> (shift - 1)) : n;
    }
};

}  // namespace llmkern::cuda
