// Arrays of any DType that end at a page that cannot be touched, random numbers, and counted checks.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "common/dtype.h"

namespace checks {

using llmkern::DType;

inline int64_t done = 0, failed = 0;

// Counts a check; the first failures are printed.
inline void check(bool ok, const char* format, ...) {
    ++done;
    if (ok || ++failed > 20) return;
    va_list arguments;
    va_start(arguments, format);
    std::fprintf(stderr, "FAILED ");
    std::vfprintf(stderr, format, arguments);
    std::fprintf(stderr, "\n");
    va_end(arguments);
}

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {  // splitmix64
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
    double normal() {
        double sum = -6;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return sum;
    }

  private:
    uint64_t state_;
};

inline int64_t size_of(DType dtype) { return dtype == DType::F32 ? 4 : dtype == DType::I8 ? 1 : 2; }

inline const char* name_of(DType dtype) {
    const char* names[] = {"fp32", "bf16", "fp16", "int8"};
    return names[static_cast<int>(dtype)];
}

// The spacing of numbers just above 1.
inline double epsilon(DType dtype) { return dtype == DType::F32 ? 0x1p-23 : dtype == DType::BF16 ? 0x1p-7 : 0x1p-10; }

class Array {
  public:
    Array(DType dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(count * size_of(dtype)) {
        const int64_t page = sysconf(_SC_PAGESIZE);
        mapped_ = (bytes_ + page - 1) / page * page + page;
        void* memory =
            mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        base_ = static_cast<char*>(memory);
        mprotect(base_ + mapped_ - page, static_cast<size_t>(page), PROT_NONE);
        data_ = base_ + mapped_ - page - bytes_;
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { munmap(base_, static_cast<size_t>(mapped_)); }

    template <class T = void>
    T* data() const {
        return reinterpret_cast<T*>(data_);
    }
    DType dtype() const { return dtype_; }
    int64_t count() const { return count_; }
    void fill(int byte) { std::memset(data_, byte, static_cast<size_t>(bytes_)); }

    double get(int64_t i) const {
        if (dtype_ == DType::F32) return data<float>()[i];
        if (dtype_ == DType::I8) return data<int8_t>()[i];
        const uint16_t word = data<uint16_t>()[i];
        if (dtype_ == DType::BF16) {
            const uint32_t wide = static_cast<uint32_t>(word) << 16;
            float x;
            std::memcpy(&x, &wide, sizeof x);
            return x;
        }
        const int exponent = word >> 10 & 31, mantissa = word & 1023;
        const double size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(mantissa, -24)
                                            : std::ldexp(1024 + mantissa, exponent - 25);
        return word & 0x8000 ? -size : size;
    }

    // Cuts off what the type cannot hold; fp16 takes normal numbers, 0 and NaN.
    void set(int64_t i, double value) {
        const float narrow = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &narrow, sizeof bits);
        if (dtype_ == DType::F32) {
            data<float>()[i] = narrow;
        } else if (dtype_ == DType::I8) {
            data<int8_t>()[i] = static_cast<int8_t>(value);
        } else if (dtype_ == DType::BF16) {
            data<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
        } else {
            const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
            const uint32_t size = narrow != narrow ? 0x7e00 : exponent <= 0 ? 0 : exponent << 10 | (bits >> 13 & 1023);
            data<uint16_t>()[i] = static_cast<uint16_t>((bits >> 16 & 0x8000) | size);
        }
    }

  private:
    DType dtype_;
    int64_t count_, bytes_, mapped_;
    char *base_, *data_;
};

inline std::unique_ptr<Array> random_array(DType dtype, int64_t count, Random& random, double scale = 1) {
    auto array = std::make_unique<Array>(dtype, count);
    for (int64_t i = 0; i < count; ++i)
        array->set(i, dtype == DType::I8 ? static_cast<double>(random.below(256) - 128) : scale * random.normal());
    return array;
}

}  // namespace checks
