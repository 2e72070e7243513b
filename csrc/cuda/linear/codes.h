// How int4 and int8 codes become pairs of bf16 or fp16: exactly, by bits that are a number's own.
//
// Four lanes of a warp share a row: lane c takes 16 bytes, then come those of the next lane. Which columns a product
// takes together is free as long as x is arranged alike, so a lane's columns are used in the order in which its words
// give them up cheapest:
//
//   int4  word of columns 0..7   pairs (0, 4) (1, 5) (2, 6) (3, 7): one mask for both, a shift by 4 in between
//   int8  word of columns 0..3   pairs (0, 2) (1, 3)
//
// Where x stays as it is because many products share it (tiles), a pair is of neighbours: a permutation of bytes more.
#pragma once

#include "cuda/common/instructions.h"

namespace llmkern::cuda {

template <class T>
struct Magic;  // a number of which the lowest bits of the fraction count ones
template <>
struct Magic<Bf16> {
    static constexpr uint32_t PAIR = 0x43004300;  // 128
    static constexpr int NEGATIVE = 0xc300;       // -128
    static constexpr uint32_t ONE = 0x3f803f80, MINUS_ONE = 0xbf80bf80;
};
template <>
struct Magic<F16> {
    static constexpr uint32_t PAIR = 0x64006400;  // 1024
    static constexpr int NEGATIVE = 0xe400;
    static constexpr uint32_t ONE = 0x3c003c00, MINUS_ONE = 0xbc00bc00;
    static constexpr uint32_t SIXTEENTH = 0x2c002c00, ONE_AND_SIXTEENTH = 0x2c003c00;
};
constexpr uint32_t MINUS_ZERO = 0x80008000;  // added to a product it changes nothing

struct Int4 {
    static constexpr int LANE_COLUMNS = 32;  // of 16 bytes
    static constexpr int WORD_COLUMNS = 8;
    static constexpr int PAIRS = 4;  // of a word
    using Piece = uint32_t;          // rows are whole words

    // -(code's offset + zero), in the form that `decode` adds.
    template <class T>
    struct Offset {
        uint32_t low, high;
    };
    template <class T>
    static LLMKERN_DEVICE Offset<T> offset(int zero) {
        // Both are numbers whose fraction counts ones (low) or sixteenths (high), so integers make them.
        const uint32_t both = 0x00010001;
        return {uint32_t(Magic<T>::NEGATIVE + 8 + zero) * both, uint32_t(0xd480 + 16 * zero) * both};
    }

    // q - zero for the eight codes of a word.
    template <class T>
    static LLMKERN_DEVICE void decode(uint32_t word, Offset<T> offset, uint32_t (&pairs)[PAIRS]) {
        if constexpr (std::is_same_v<T, F16>) {
            // A nibble four bits up counts sixteens.
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t w = word >> 8 * i;
                pairs[2 * i] = fma2<T>(mask_or(w, 0x000f000f, Magic<T>::PAIR), Magic<T>::ONE, offset.low);
                pairs[2 * i + 1] = fma2<T>(mask_or(w, 0x00f000f0, Magic<T>::PAIR), Magic<T>::SIXTEENTH, offset.high);
            }
        } else {
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
                pairs[i] = fma2<T>(mask_or(word >> 4 * i, 0x000f000f, Magic<T>::PAIR), Magic<T>::ONE, offset.low);
        }
    }

    // q + RAW_BIAS<T>, in fewer operations.
    template <class T>
    static constexpr float RAW_BIAS = std::is_same_v<T, F16> ? 0.0f : 136.0f;
    template <class T>
    static LLMKERN_DEVICE void decode_raw(uint32_t word, uint32_t (&pairs)[PAIRS]) {
        if constexpr (std::is_same_v<T, F16>) return decode<T>(word, offset<T>(0), pairs);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) pairs[i] = mask_or(word >> 4 * i, 0x000f000f, Magic<T>::PAIR);
    }

    // x of a word's columns, in pairs of neighbours, to the pairs above.
    static LLMKERN_DEVICE void arrange(uint32_t (&x)[PAIRS]) {
        const uint32_t a = x[0], b = x[1], c = x[2], d = x[3];
        x[0] = permute(a, c, 0x5410), x[1] = permute(a, c, 0x7632);
        x[2] = permute(b, d, 0x5410), x[3] = permute(b, d, 0x7632);
    }

    // The pair of columns 2i and 2i + 1 of a word, with neighbour_selector(i) and neighbour_offset(zero). ALONE:
    // nothing else of the word is used, so no shift can be shared, and a product puts a byte's nibbles 16 bits apart:
    // shifts, masks and permutations have one half-rate pipe together, products another.
    static LLMKERN_DEVICE uint32_t neighbour_selector(int i) { return i * 0x1111 + 0x4400; }
    template <class T>
    static LLMKERN_DEVICE uint32_t neighbour_offset(int zero) {
        const auto both = offset<T>(zero);
        return std::is_same_v<T, F16> ? permute(both.low, both.high, 0x7610) : both.low;
    }
    template <class T, bool ALONE = false>
    static LLMKERN_DEVICE uint32_t neighbours(uint32_t word, uint32_t selector, uint32_t offset) {
        if constexpr (std::is_same_v<T, F16>) {
            // The byte in both halves; the upper one's nibble counts sixteens.
            const uint32_t bytes = permute(word, word, selector);
            return fma2<T>(mask_or(bytes, 0x00f0000f, Magic<T>::PAIR), Magic<T>::ONE_AND_SIXTEENTH, offset);
        } else {
            const uint32_t nibbles =
                ALONE ? permute(word, 0, (selector & 0xf) | 0x4440) * 0x1001 : permute(word, word >> 4, selector);
            return fma2<T>(mask_or(nibbles, 0x000f000f, Magic<T>::PAIR), Magic<T>::ONE, offset);
        }
    }
};

struct Int8 {
    static constexpr int LANE_COLUMNS = 16;
    static constexpr int WORD_COLUMNS = 4;
    static constexpr int PAIRS = 2;
    using Piece = uint8_t;

    template <class T>
    struct Offset {
        uint32_t pair;
    };
    template <class T>
    static LLMKERN_DEVICE Offset<T> offset(int zero) {
        const float value = -(std::is_same_v<T, F16> ? 1152 + float(zero) : float(zero));
        return {pack2<T>(value, value)};
    }

    template <class T>
    static LLMKERN_DEVICE void decode(uint32_t word, Offset<T> offset, uint32_t (&pairs)[PAIRS]) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            if constexpr (std::is_same_v<T, F16>) {
                // code + 128 is a byte, which 1024 and more hold.
                const uint32_t bytes = (word ^ 0x80808080) >> 8 * i;
                pairs[i] = fma2<T>(mask_or(bytes, 0x00ff00ff, Magic<T>::PAIR), Magic<T>::ONE, offset.pair);
            } else {
                // bf16 has room for seven bits: (128 + code % 128) - (128 or 256), then the zero.
                const uint32_t w = word >> 8 * i;
                const uint32_t code = fma2<T>(mask_or(w, 0x00800080, Magic<T>::PAIR), Magic<T>::MINUS_ONE,
                                              mask_or(w, 0x007f007f, Magic<T>::PAIR));
                pairs[i] = fma2<T>(code, Magic<T>::ONE, offset.pair);
            }
        }
    }

    template <class T>
    static constexpr float RAW_BIAS = 0;
    template <class T>
    static LLMKERN_DEVICE void decode_raw(uint32_t word, uint32_t (&pairs)[PAIRS]) {
        if constexpr (std::is_same_v<T, F16>) return decode<T>(word, offset<T>(0), pairs);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const uint32_t w = word >> 8 * i;
            pairs[i] = fma2<T>(mask_or(w, 0x00800080, Magic<T>::PAIR), Magic<T>::MINUS_ONE,
                               mask_or(w, 0x007f007f, Magic<T>::PAIR));
        }
    }

    static LLMKERN_DEVICE void arrange(uint32_t (&x)[PAIRS]) {
        const uint32_t a = x[0], b = x[1];
        x[0] = permute(a, b, 0x5410), x[1] = permute(a, b, 0x7632);
    }

    static LLMKERN_DEVICE uint32_t neighbour_selector(int i) { return i * 0x0202 + 0x4140; }
    template <class T>
    static LLMKERN_DEVICE uint32_t neighbour_offset(int zero) {
        return offset<T>(zero).pair;
    }
    template <class T, bool ALONE = false>
    static LLMKERN_DEVICE uint32_t neighbours(uint32_t word, uint32_t selector, uint32_t offset) {
        if constexpr (std::is_same_v<T, F16>) {
            return fma2<T>(permute(word ^ 0x80808080, Magic<T>::PAIR >> 8, selector), Magic<T>::ONE, offset);
        } else {
            const uint32_t w = permute(word, 0, selector);
            const uint32_t code = fma2<T>(mask_or(w, 0x00800080, Magic<T>::PAIR), Magic<T>::MINUS_ONE,
                                          mask_or(w, 0x007f007f, Magic<T>::PAIR));
            return fma2<T>(code, Magic<T>::ONE, offset);
        }
    }
};

}  // namespace llmkern::cuda
