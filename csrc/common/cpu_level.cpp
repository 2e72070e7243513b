#include "common/cpu_level.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace llmkern {
namespace {

#if defined(__x86_64__)

struct Leaf {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
    Leaf r;
    if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
    return r;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

// Which register files the operating system saves; valid only if CPUID reports OSXSAVE.
uint64_t enabled_states() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool is_amd() {
    const Leaf vendor = cpuid(0, 0);  // "Auth" "enti" "cAMD"
    return vendor.ebx == 0x68747541 && vendor.edx == 0x69746e65 && vendor.ecx == 0x444d4163;
}

Cpu ask() {
    const Leaf one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
    const uint64_t states = bit(one.ecx, 27) ? enabled_states() : 0;
    const bool ymm = (states & 0x6) == 0x6;           // SSE and AVX
    const bool zmm = ymm && (states & 0xe0) == 0xe0;  // opmask, upper ZMM0-15, ZMM16-31
    const bool tmm = (states & 0x60000) == 0x60000;   // tile configuration and data
    Cpu cpu{};
    cpu.fma = ymm && bit(one.ecx, 12);
    cpu.f16c = ymm && bit(one.ecx, 29);
    cpu.avx2 = ymm && bit(seven.ebx, 5);
    cpu.bmi2 = bit(seven.ebx, 8);
    cpu.avx512f = zmm && bit(seven.ebx, 16);
    cpu.avx512dq = zmm && bit(seven.ebx, 17);
    cpu.avx512bw = zmm && bit(seven.ebx, 30);
    cpu.avx512vl = zmm && bit(seven.ebx, 31);
    cpu.avx512vbmi = zmm && bit(seven.ecx, 1);
    cpu.avx512vbmi2 = zmm && bit(seven.ecx, 6);
    cpu.avx512vnni = zmm && bit(seven.ecx, 11);
    cpu.avx512bf16 = zmm && bit(more.eax, 5);
    cpu.amx_bf16 = tmm && bit(seven.edx, 22);
    cpu.amx_tile = tmm && bit(seven.edx, 24);
    cpu.amx_int8 = tmm && bit(seven.edx, 25);
#ifdef LLMKERN_EMULATE  // the levels above avx2 are built of its instructions
    cpu.avx512f = cpu.avx512bw = cpu.avx512dq = cpu.avx512vl = cpu.avx512vnni = cpu.avx2;
    cpu.avx512vbmi = cpu.avx512vbmi2 = cpu.avx512bf16 = cpu.amx_tile = cpu.amx_int8 = cpu.amx_bf16 = cpu.avx2;
#endif
    return cpu;
}

// Linux hands out the tile registers only to a process that asks for them.
bool amx_granted() {
#if defined(LLMKERN_EMULATE)
    return true;
#elif defined(__linux__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

#elif defined(__aarch64__) && defined(__linux__)

bool is_amd() { return false; }

// What the kernel says that it and the processor support. Numbers, because older headers lack the newer names.
Cpu ask() {
    const unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
    const auto bit = [](unsigned long word, int index) { return ((word >> index) & 1) != 0; };
    Cpu cpu{};
    cpu.crc32 = bit(one, 7);
    cpu.lse = bit(one, 8);
    cpu.fp16 = bit(one, 9) && bit(one, 10);  // scalar and vector
    cpu.rdm = bit(one, 12);
    cpu.dotprod = bit(one, 20);
    cpu.i8mm = bit(two, 13);
    return cpu;
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool is_amd() { return false; }

bool has(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}

Cpu ask() {
    Cpu cpu{};
    cpu.crc32 = has("hw.optional.armv8_crc32");
    cpu.lse = has("hw.optional.arm.FEAT_LSE");
    cpu.fp16 = has("hw.optional.arm.FEAT_FP16");
    cpu.rdm = has("hw.optional.arm.FEAT_RDM");
    cpu.dotprod = has("hw.optional.arm.FEAT_DotProd");
    cpu.i8mm = has("hw.optional.arm.FEAT_I8MM");
    return cpu;
}

#else

bool is_amd() { return false; }

Cpu ask() { return {}; }

#endif

}  // namespace

bool fast_bf16_products() {
#ifdef LLMKERN_EMULATE
    return true;  // tests are to see them
#endif
    static const bool fast = is_amd();
    return fast;
}

const std::vector<Level>& levels() {
    static const std::vector<Level> table = [] {
        [[maybe_unused]] const Cpu cpu = ask();
        return std::vector<Level>{
#define LLMKERN_LEVEL(name, flags, test) {#name, (test), flags},
#include "common/levels.def"
#undef LLMKERN_LEVEL
        };
    }();
    return table;
}

}  // namespace llmkern
