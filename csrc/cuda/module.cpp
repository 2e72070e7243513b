// The Python module _cuda: per op a submodule, and in it one function per kernel (the rows of the op's kernels.def).
// Pointers come as integers: the Python side (ops/_cuda.py and each op's `cuda`) has checked the tensors and chosen the
// sizes. A launch that fails is a RuntimeError.
#include <pybind11/pybind11.h>

#include "cuda/bitmask_linear/bitmask_linear.h"
#include "cuda/gptq_block/gptq_block.h"
#include "cuda/int4_linear/int4_linear.h"
#include "cuda/int8_dynamic_linear/int8_dynamic_linear.h"
#include "cuda/int8_linear/int8_linear.h"
#include "cuda/scale_search/scale_search.h"
#include "cuda/sparse24_int4_linear/sparse24_int4_linear.h"
#include "cuda/sparse24_linear/sparse24_linear.h"
#include "cuda/sparsegpt_block/sparsegpt_block.h"

namespace py = pybind11;

namespace llmkern::cuda {
namespace {

using Address = uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Defines `op.kernel(x, x_dtype, bias, bias_dtype, y, m, n, k, stream, row_tiles, token_tiles, splits, *weight)`;
// make(LinearArgs, weight...) gives the op's own arguments.
template <class Args, class... Weight>
void def_linear(py::module_& op, const char* kernel, void (*run)(const Args&, const Plan&),
                Args (*make)(LinearArgs, Weight...)) {
    op.def(
        kernel,
        [run, make](Address x, int x_dtype, Address bias, int bias_dtype, Address y, int64_t m, int64_t n, int64_t k,
                    Address stream, int row_tiles, int token_tiles, int splits, Weight... weight) {
            const LinearArgs linear{at<void>(x), DType(x_dtype),  at<void>(bias), DType(bias_dtype), at<void>(y), m, n,
                                    k,           at<void>(stream)};
            run(make(linear, weight...), Plan{row_tiles, token_tiles, splits});
        },
        NoGil());
}

CodesArgs codes_args(LinearArgs linear, Address codes, Address scales, int scales_dtype, Address zeros,
                     int64_t group_size) {
    return {linear, at<void>(codes), at<void>(scales), DType(scales_dtype), at<int8_t>(zeros), group_size};
}

IntegerCodesArgs integer_codes_args(LinearArgs linear, Address codes, Address scales, int scales_dtype, Address zeros,
                                    int64_t group_size, Address workspace) {
    return {codes_args(linear, codes, scales, scales_dtype, zeros, group_size), at<void>(workspace)};
}

KeptArgs kept_args(LinearArgs linear, Address values, int values_dtype, Address positions, Address scales,
                   int scales_dtype, int64_t group_size) {
    return {linear,           at<void>(values),    DType(values_dtype), at<uint8_t>(positions),
            at<void>(scales), DType(scales_dtype), group_size};
}

MaskArgs mask_args(LinearArgs linear, Address values, int values_dtype, Address bits, Address row_offsets,
                   Address scales, int scales_dtype, int64_t group_size) {
    return {linear,           at<void>(values),    DType(values_dtype), at<uint8_t>(bits), at<int64_t>(row_offsets),
            at<void>(scales), DType(scales_dtype), group_size};
}

void def_columns(py::module_& op, const char* kernel, void (*run)(const ColumnArgs&, const ColumnPlan&, void*)) {
    op.def(
        kernel,
        [run](Address w, Address wc, Address v, Address diagonal, Address mask, int prune_n, int prune_m,
              Address scales, Address zeros, Address group, Address q, Address keep, int64_t layers, int64_t n, int b,
              int64_t groups, int bits, int lanes, int rows, int warps, Address stream) {
            ColumnArgs args{};
            args.w = at<float>(w), args.wc = at<float>(wc), args.v = at<float>(v);
            args.diagonal = at<float>(diagonal), args.mask = at<uint8_t>(mask);
            args.prune_n = prune_n, args.prune_m = mask ? 0 : prune_m;
            args.scales = at<float>(scales), args.zeros = at<int8_t>(zeros), args.group = at<int32_t>(group);
            args.q = at<float>(q), args.keep = at<uint8_t>(keep);
            args.layers = layers, args.n = n, args.b = b, args.groups = groups, args.bits = bits;
            run(args, ColumnPlan{lanes, rows, warps}, at<void>(stream));
        },
        NoGil());
}

void def_scale_search(py::module_& op, const char* kernel, void (*run)(const ScaleSearchArgs&)) {
    op.def(
        kernel,
        [run](Address w, Address importance, Address scales, Address zeros, int64_t n, int64_t k, int64_t group_size,
              int bits, bool symmetric, int steps, double smallest, int blocks, Address stream) {
            run({at<float>(w), at<float>(importance), at<float>(scales), at<int8_t>(zeros), n, k, group_size, bits,
                 symmetric, steps, smallest, blocks, at<void>(stream)});
        },
        NoGil());
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
    m.doc() = "llmkern's CUDA kernels; call them through llmkern.ops.";

    py::module_ int8_linear_module = m.def_submodule("int8_linear");
#define LLMKERN_KERNEL(kernel) def_linear(int8_linear_module, #kernel, kernels::kernel::int8_linear, codes_args);
#include "cuda/int8_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ int8_dynamic_linear_module = m.def_submodule("int8_dynamic_linear");
#define LLMKERN_KERNEL(kernel) \
    def_linear(int8_dynamic_linear_module, #kernel, kernels::kernel::int8_dynamic_linear, integer_codes_args);
#include "cuda/int8_dynamic_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ int4_linear_module = m.def_submodule("int4_linear");
#define LLMKERN_KERNEL(kernel) def_linear(int4_linear_module, #kernel, kernels::kernel::int4_linear, codes_args);
#include "cuda/int4_linear/kernels.def"
#undef LLMKERN_KERNEL
#define LLMKERN_KERNEL(kernel) \
    def_linear(int4_linear_module, #kernel "_int8", kernels::kernel::int4_linear_int8, integer_codes_args);
#include "cuda/int4_linear/int8_kernels.def"
#undef LLMKERN_KERNEL

    py::module_ sparse24_linear_module = m.def_submodule("sparse24_linear");
#define LLMKERN_KERNEL(kernel) def_linear(sparse24_linear_module, #kernel, kernels::kernel::sparse24_linear, kept_args);
#include "cuda/sparse24_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ sparse24_int4_linear_module = m.def_submodule("sparse24_int4_linear");
#define LLMKERN_KERNEL(kernel) \
    def_linear(sparse24_int4_linear_module, #kernel, kernels::kernel::sparse24_int4_linear, kept_args);
#include "cuda/sparse24_int4_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ bitmask_linear_module = m.def_submodule("bitmask_linear");
#define LLMKERN_KERNEL(kernel) def_linear(bitmask_linear_module, #kernel, kernels::kernel::bitmask_linear, mask_args);
#include "cuda/bitmask_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ gptq_block_module = m.def_submodule("gptq_block");
#define LLMKERN_KERNEL(kernel) def_columns(gptq_block_module, #kernel, kernels::kernel::gptq_block);
#include "cuda/gptq_block/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ sparsegpt_block_module = m.def_submodule("sparsegpt_block");
#define LLMKERN_KERNEL(kernel) def_columns(sparsegpt_block_module, #kernel, kernels::kernel::sparsegpt_block);
#include "cuda/sparsegpt_block/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ scale_search_module = m.def_submodule("scale_search");
#define LLMKERN_KERNEL(kernel) def_scale_search(scale_search_module, #kernel, kernels::kernel::scale_search);
#include "cuda/scale_search/kernels.def"
#undef LLMKERN_KERNEL
}

}  // namespace llmkern::cuda
