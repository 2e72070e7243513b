// In the place of csrc/cuda/common/wgmma.h. A product is done when it is waited for, with what its registers and the
// shared memory hold then: what is overwritten too early shows.
#pragma once

#include "cuda/common/instructions.h"
#include "cuda/common/matrix_descriptor.h"

#define LLMKERN_HAS_WGMMA 1

namespace llmkern::cuda {

inline void fence_async() {
    machine.current->unfenced = false;
    machine.current->fenced = machine.current->block->landings;
}
inline void wgmma_fence() { machine.current->registers_fenced = true; }

inline void wgmma_commit() {
    auto& fiber = *machine.current;
    fiber.product_groups.push_back(std::move(fiber.open_products));
    fiber.open_products.clear();
    fiber.registers_fenced = false;
}

template <int PENDING>
void wgmma_wait() {
    auto& groups = machine.current->product_groups;
    std::vector<emulated::AsyncProduct> due;
    while (groups.size() > PENDING) {
        due.insert(due.end(), groups.front().begin(), groups.front().end());
        groups.erase(groups.begin());
    }
    meet(emulated::my_warpgroup(), thread() % 128, "wgmma_wait", &due, [](void* const* all) {
        const auto due_of = [all](int i) -> auto& {
            return *static_cast<std::vector<emulated::AsyncProduct>*>(all[i]);
        };
        for (size_t at = 0; at < due_of(0).size(); at++) {
            const emulated::AsyncProduct* threads[128];
            for (int i = 0; i < 128; i++) {
                threads[i] = &due_of(i).at(at);
                if (due_of(i).size() != due_of(0).size() || threads[i]->run != threads[0]->run ||
                    threads[i]->a_shared != threads[0]->a_shared || threads[i]->b_shared != threads[0]->b_shared)
                    throw std::runtime_error("wgmma: the threads of a warpgroup ask for different products");
            }
            threads[0]->run(threads);
        }
    });
}

// Where row and column of an operand (of 16 columns) are in shared memory. The fields of the descriptor: bits 0 to 13
// the start, 16 to 29 the leading and 32 to 45 the stride offset, all in 16 bytes; 49 to 51 the base offset; 62 and 63
// the swizzle. With the swizzle of 128 bytes, bits 4 to 6 of an address are xored with its bits 7 to 9.
inline uint32_t described_at(uint64_t descriptor, int row, int column) {
    const auto field = [descriptor](int low, int bits) { return uint32_t(descriptor >> low & ((1u << bits) - 1)); };
    const uint32_t start = field(0, 14) * 16, stride = field(32, 14) * 16;
    if (field(62, 2) != 1) throw std::runtime_error("wgmma: only the swizzle of 128 bytes is emulated");
    if (field(49, 3) != 0 || stride % 1024) throw std::runtime_error("wgmma: base offset or stride is not emulated");
    if (start % 128 + column * 2 >= 128) throw std::runtime_error("wgmma: columns beyond the swizzled row");
    const uint32_t address = start + row / 8 * stride + row % 8 * 128 + column * 2;
    const uint32_t at = address ^ (address >> 7 & 7) << 4;
    const auto& block = *machine.current->block;
    if (block.shared + at + 2 > block.memory.data() + block.memory.size())
        throw std::runtime_error("wgmma: an operand beyond the shared memory");
    return at;
}

inline uint16_t described(uint64_t descriptor, int row, int column) {
    uint16_t bits;
    std::memcpy(&bits, machine.current->block->shared + described_at(descriptor, row, column), sizeof bits);
    return bits;
}

template <class T, int TOKENS>
void run_wgmma(const emulated::AsyncProduct* const* threads) {
    static float left[64][16], right[TOKENS][16];
    for (int n = 0; n < TOKENS; n++)
        for (int k = 0; k < 16; k++) right[n][k] = to_float<T>(described(threads[0]->b_shared, n, k));
    for (int row = 0; row < 64; row++)
        for (int k = 0; k < 16; k++) {
            // Of four warps with 16 rows each: lane 4g + c has columns 2c, 2c + 1 (and 8 more) of row g (and 8 more).
            const int from = row / 16 * 32 + row % 8 * 4 + k % 8 / 2, at = row % 16 / 8 + k / 8 * 2;
            const uint32_t* const a = static_cast<const uint32_t*>(threads[from]->a);
            left[row][k] = to_float<T>(a ? uint16_t(a[at] >> 16 * (k % 2)) : described(threads[0]->a_shared, row, k));
        }
    for (int thread = 0; thread < 128; thread++)
        for (int t = 0; t < TOKENS / 8; t++)
            for (int i = 0; i < 4; i++) {
                const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8, column = 8 * t + thread % 4 * 2 + i % 2;
                float& sum = static_cast<float*>(threads[thread]->d)[4 * t + i];
                double exact = sum;
                for (int k = 0; k < 16; k++) exact += double(left[row][k]) * right[column][k];
                sum = float(exact);
            }
}

// tokens, columns: of b, as pairs of bytes.
inline void issue(const emulated::AsyncProduct& product, int tokens, int columns = 16) {
    const auto& block = *machine.current->block;
    for (const auto* fiber : machine.fibers)
        if (fiber->block == &block && fiber->unfenced)
            throw std::runtime_error("wgmma: asynchronous copies have landed without fence_async");
    for (int row = 0; row < tokens && thread() % 32 == 0; row++)
        for (int column = 0; column < columns; column += 8)
            if (block.landed.at(described_at(product.b_shared, row, column) / 16) > machine.current->fenced)
                throw std::runtime_error("wgmma: no fence_async since asynchronous copies have landed");
    if (product.a && !machine.current->registers_fenced)
        throw std::runtime_error("wgmma: registers without wgmma_fence since the last group");
    machine.current->open_products.push_back(product);
}

template <class T, int TOKENS>
void wgmma(float (&d)[TOKENS / 8][4], const uint32_t (&a)[4], uint64_t b) {
    issue({d, a, 0, b, run_wgmma<T, TOKENS>}, TOKENS);
}
template <class T, int TOKENS>
void wgmma(float (&d)[TOKENS / 8][4], uint64_t a, uint64_t b) {
    issue({d, nullptr, a, b, run_wgmma<T, TOKENS>}, TOKENS);
}

}  // namespace llmkern::cuda
