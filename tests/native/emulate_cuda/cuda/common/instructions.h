// In the place of csrc/cuda/common/instructions.h: what each of its functions does, in plain C++, on a fiber of
// machine.h. Fragment layouts are written down here a second time, from the PTX ISA's figures.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "machine.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define LLMKERN_DEVICE inline

namespace llmkern::cuda {

using emulated::machine;
using emulated::meet;

struct Bf16 {};
struct F16 {};

struct alignas(8) Words2 {
    uint32_t w[2];
};
struct alignas(16) Words4 {
    uint32_t w[4];
};
struct alignas(16) Floats4 {
    float f[4];
};

inline int thread() { return machine.current->thread; }
inline int block_x() { return machine.current->block->index.x; }
inline int block_y() { return machine.current->block->index.y; }
inline int block_z() { return machine.current->block->index.z; }
inline uint8_t* shared_memory() { return machine.current->block->shared; }
inline uint32_t shared_address(const void* pointer) {
    return uint32_t(static_cast<const uint8_t*>(pointer) - shared_memory());
}

inline void sync_block() {
    meet(machine.current->block->all, thread(), "sync_block", nullptr, [](void* const*) {});
}
inline void sync_warp() {
    meet(emulated::my_warp(), emulated::my_lane(), "sync_warp", nullptr, [](void* const*) {});
}
inline void sync_cluster() {
    const int place = machine.current->rank * machine.current->block->all.size + thread();
    meet(*machine.cluster_group, place, "sync_cluster", nullptr, [](void* const*) {});
}

template <class V>
V load_cluster(const V* mine, int rank) {
    const auto offset = reinterpret_cast<const uint8_t*>(mine) - shared_memory();
    V value;
    std::memcpy(&value, machine.cluster.at(rank)->shared + offset, sizeof value);
    return value;
}

// `result(lane, values)` of all lanes' values.
template <class V, class F>
V exchange(const char* operation, V value, F result) {
    struct Record {
        V in, out;
    } record{value, value};
    meet(emulated::my_warp(), emulated::my_lane(), operation, &record, [&](void* const* all) {
        V values[emulated::LANES];
        for (int i = 0; i < emulated::LANES; i++) values[i] = static_cast<Record*>(all[i])->in;
        for (int i = 0; i < emulated::LANES; i++) static_cast<Record*>(all[i])->out = result(i, values);
    });
    return record.out;
}

template <class V>
V shuffle(V value, int lane) {
    struct Pair {
        V value;
        int lane;
    };
    return exchange("shuffle", Pair{value, lane},
                    [](int i, const Pair* all) { return Pair{all[all[i].lane & 31].value, all[i].lane}; })
        .value;
}

template <class V>
V shuffle_xor(V value, int mask) {
    return exchange("shuffle_xor", value, [mask](int i, const V* all) { return all[i ^ mask]; });
}

inline void dependency_wait() {}
inline void prefetch_l2(const void*) {}

inline Words4 load_once(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16) throw std::runtime_error("misaligned load of 16 bytes");
    Words4 v;
    std::memcpy(&v, address, sizeof v);
    return v;
}
inline Words2 load_once8(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 8) throw std::runtime_error("misaligned load of 8 bytes");
    Words2 v;
    std::memcpy(&v, address, sizeof v);
    return v;
}
inline Words4 load_shared_use(const void* address) { return load_once(address); }

inline uint32_t load_2_or_4(const void* address, bool four) {
    if (reinterpret_cast<uintptr_t>(address) % (four ? 4 : 2)) throw std::runtime_error("misaligned load");
    uint32_t v = 0;
    std::memcpy(&v, address, four ? 4 : 2);
    return v;
}

template <int SIZE>
void copy_in_background(void* to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % SIZE || reinterpret_cast<uintptr_t>(to) % SIZE || bytes < 0 || bytes > SIZE)
        throw std::runtime_error("copy_async: misaligned, or more bytes than it copies");
    // Every other warp's copies land at once, so that what is overwritten too early shows too.
    emulated::Copy copy{static_cast<uint8_t*>(to), thread() / emulated::LANES % 2 != 0, SIZE, {}};
    if (bytes) std::memcpy(copy.bytes, from, bytes);
    if (copy.done) std::memcpy(to, copy.bytes, SIZE);
    machine.current->open.push_back(copy);
}
inline void copy_async(void* to, const void* from, int bytes) { copy_in_background<16>(to, from, bytes); }
inline void copy_async8(void* to, const void* from, int bytes) { copy_in_background<8>(to, from, bytes); }
inline void copy_async_if(bool there, void* to, const void* from) { copy_async(to, from, there ? 16 : 0); }
inline void copy_async_commit() {
    auto& fiber = *machine.current;
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int PENDING>
void copy_async_wait() {
    if (PENDING == 0) emulated::wait_until([] { return machine.current->landings.empty(); });
    auto& groups = machine.current->groups;
    while (groups.size() > PENDING) {
        for (const auto& copy : groups.front())
            if (!copy.done) std::memcpy(copy.to, copy.bytes, copy.size);
        machine.current->unfenced |= !groups.front().empty();
        groups.erase(groups.begin());
    }
}

inline void load_matrices(uint32_t (&d)[4], const void* row) {
    struct Record {
        const uint8_t* row;
        uint32_t* d;
    } record{static_cast<const uint8_t*>(row), d};
    if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("load_matrices: misaligned row");
    meet(emulated::my_warp(), emulated::my_lane(), "load_matrices", &record, [](void* const* all) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                std::memcpy(static_cast<Record*>(all[lane])->d + i,
                            static_cast<Record*>(all[8 * i + lane / 4])->row + lane % 4 * 4, 4);
    });
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; i++) d |= uint32_t(both >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
    return d;
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint32_t mask_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline int popcount(uint32_t a) { return __builtin_popcount(a); }
inline uint32_t larger_halves(uint32_t a, uint32_t b) {
    const uint32_t high = std::max(a >> 16, b >> 16), low = std::max(a & 0xffff, b & 0xffff);
    return high << 16 | low;
}
inline int dot4(uint32_t a, uint32_t b, int c) {
    for (int i = 0; i < 4; i++) c += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
    return c;
}

// Rounds a double once to the type's bits: to nearest, ties to even.
template <class T>
uint16_t round_to(double value) {
    constexpr int FRACTION = std::is_same_v<T, Bf16> ? 7 : 10, EXPONENT = std::is_same_v<T, Bf16> ? 8 : 5;
    constexpr int BIAS = (1 << (EXPONENT - 1)) - 1, INFINITE = ((1 << EXPONENT) - 1) << FRACTION;
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7fff;
    if (std::isinf(value)) return uint16_t(sign | INFINITE);
    if (value == 0) return uint16_t(sign);
    const int exponent = std::max(std::ilogb(value), 1 - BIAS);
    const double units = std::nearbyint(std::ldexp(std::fabs(value), FRACTION - exponent));
    const auto bits = int64_t(units) + (int64_t(exponent + BIAS - 1) << FRACTION);
    return uint16_t(sign | (bits >= INFINITE ? INFINITE : bits));
}

inline float as_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

template <class T>
float to_float(uint16_t value) {
    if constexpr (std::is_same_v<T, Bf16>) {
        return as_float(uint32_t(value) << 16);
    } else {
        const int exponent = value >> 10 & 31, fraction = value & 1023;
        const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                           : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                          : std::ldexp(float(fraction), -24);
        return value & 0x8000 ? -size : size;
    }
}

template <class T>
uint32_t pack2(float first, float second) {
    return round_to<T>(first) | uint32_t(round_to<T>(second)) << 16;
}

template <class T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const auto half = [shift](uint32_t v) { return double(to_float<T>(uint16_t(v >> shift))); };
        d |= uint32_t(round_to<T>(half(a) * half(b) + half(c))) << shift;
    }
    return d;
}

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline int round_to_int(float value) { return int(std::nearbyint(value)); }

// Through volatile, so that no compiler fuses what must be rounded twice.
inline float rounded(float value) {
    const volatile float stored = value;
    return stored;
}
inline float multiply(float a, float b) { return rounded(a * b); }
inline float subtract(float a, float b) { return rounded(a - b); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float divide(float a, float b) { return a / b; }
inline float round_even(float value) { return std::nearbyint(value); }
inline float minimum(float a, float b) { return std::fmin(a, b); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float settle(float value) { return value; }
inline uint32_t settle(uint32_t value) { return value; }
inline const uint8_t* settle(const uint8_t* pointer) { return pointer; }
inline float absolute(float value) { return std::fabs(value); }

// What all lanes bring to a product, and where each wants its part of the sum.
template <class D>
struct Product {
    D* d;
    const uint32_t* a;
    uint32_t b[4];
    uint32_t positions;
};

template <class T>
float half_of(const uint32_t* registers, int index, int which) {
    return to_float<T>(uint16_t(registers[index] >> 16 * which));
}

// Row of element i of an accumulator fragment, and its column.
inline int d_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
inline int d_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product<float> mine{d, a, {b0, b1}, 0};
    meet(emulated::my_warp(), emulated::my_lane(), "mma", &mine, [](void* const* all) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const auto& from = *static_cast<Product<float>*>(all[lane]);
            const int g = lane / 4, c = lane % 4;
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 2; h++) left[g + i % 2 * 8][2 * c + h + i / 2 * 8] = half_of<T>(from.a, i, h);
            for (int i = 0; i < 2; i++)
                for (int h = 0; h < 2; h++) right[2 * c + h + 8 * i][g] = half_of<T>(from.b, i, h);
        }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                float& sum = static_cast<Product<float>*>(all[lane])->d[i];
                double exact = sum;
                for (int k = 0; k < 16; k++) exact += double(left[d_row(lane, i)][k]) * right[k][d_column(lane, i)];
                sum = float(exact);
            }
    });
}

inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product<int> mine{d, a, {b0, b1}, 0};
    meet(emulated::my_warp(), emulated::my_lane(), "mma_s8", &mine, [](void* const* all) {
        int left[16][32], right[32][8];
        for (int lane = 0; lane < 32; lane++) {
            const auto& from = *static_cast<Product<int>*>(all[lane]);
            const int g = lane / 4, c = lane % 4;
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 4; h++) left[g + i % 2 * 8][4 * c + h + i / 2 * 16] = int8_t(from.a[i] >> 8 * h);
            for (int i = 0; i < 2; i++)
                for (int h = 0; h < 4; h++) right[4 * c + h + 16 * i][g] = int8_t(from.b[i] >> 8 * h);
        }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                for (int k = 0; k < 32; k++)
                    static_cast<Product<int>*>(all[lane])->d[i] +=
                        left[d_row(lane, i)][k] * right[k][d_column(lane, i)];
    });
}

template <class T, int SELECTOR>
void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t positions) {
    Product<float> mine{d, a, {b[0], b[1], b[2], b[3]}, positions};
    meet(emulated::my_warp(), emulated::my_lane(), "mma_sparse", &mine, [](void* const* all) {
        float left[16][32] = {}, right[32][8];
        for (int lane = 0; lane < 32; lane++) {
            const auto& from = *static_cast<Product<float>*>(all[lane]);
            const int g = lane / 4, c = lane % 4;
            for (int i = 0; i < 4; i++) {
                const int row = g + i % 2 * 8, quad = c + i / 2 * 4;
                const auto& meta = *static_cast<Product<float>*>(all[4 * g + 2 * SELECTOR + quad / 4]);
                const uint32_t nibble = meta.positions >> (16 * (i % 2) + 4 * (quad % 4)) & 15;
                if ((nibble & 3) >= nibble >> 2) throw std::runtime_error("mma_sparse: positions out of order");
                for (int h = 0; h < 2; h++) left[row][4 * quad + (nibble >> 2 * h & 3)] = half_of<T>(from.a, i, h);
            }
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 2; h++) right[2 * c + h + 8 * i][g] = half_of<T>(from.b, i, h);
        }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                float& sum = static_cast<Product<float>*>(all[lane])->d[i];
                double exact = sum;
                for (int k = 0; k < 32; k++) exact += double(left[d_row(lane, i)][k]) * right[k][d_column(lane, i)];
                sum = float(exact);
            }
    });
}

}  // namespace llmkern::cuda
