// No byte dot products at this level (LLMKERN_BYTE_DOT is not defined): the integer driver multiplies 16-bit codes.
#pragma once

namespace llmkern::baseline {

struct Dot4 {
    static constexpr bool FAST = false;
};

struct Dot8 {
    static constexpr bool FAST = false;
};

struct Tile4 {
    static constexpr bool FAST = false;
};

struct Tile8 {
    static constexpr bool FAST = false;
};

}  // namespace llmkern::baseline
