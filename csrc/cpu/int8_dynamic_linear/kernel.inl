// int8 weights, x quantized to int8 per row: the integer driver over rows of codes.
#include "cpu/int8_dynamic_linear/int8_dynamic_linear.h"
#include "cpu/linear/integer.h"

namespace llmkern::LLMKERN_NS {
namespace {

struct Int8Rows {
    using Dot = Dot8;
    using Tile = Tile8;

    const int8_t* codes;
    int64_t k;

    const uint8_t* row(int64_t n) const { return reinterpret_cast<const uint8_t*>(codes + n * k); }
    int64_t row_bytes() const { return k; }

    LLMKERN_INLINE_MEMBER int16_t code(const uint8_t* row, int64_t column) const {
        return static_cast<int8_t>(row[column]);
    }
};

}  // namespace

void int8_dynamic_linear(const Int8LinearArgs& args) {
    const LinearArgs& a = args.linear;
    run_integer(a, GroupArgs{args.scales, args.scales_dtype, args.zeros, args.group_size, a.k}, a.k,
                Int8Rows{args.codes, a.k});
}

}  // namespace llmkern::LLMKERN_NS
