// The Python module _C: the only file that knows pybind11. Per op a submodule, and in it one function per level that
// has a kernel (the rows of the op's kernels.def). Pointers come as integers: the Python side (ops/_linear.py
// `native_call` and each op's `native`) has checked the tensors.
//
// To add an op: csrc/cpu/<op>/{<op>.h,kernels.def,kernel.inl,<level>.cpp}, then here an include, a def_<op> function,
// and a block in PYBIND11_MODULE that expands its kernels.def.
#include <pybind11/pybind11.h>

#include "common/cpu_level.h"
#include "cpu/bitmask_linear/bitmask_linear.h"
#include "cpu/gptq_block/gptq_block.h"
#include "cpu/int4_linear/int4_linear.h"
#include "cpu/int8_dynamic_linear/int8_dynamic_linear.h"
#include "cpu/int8_linear/int8_linear.h"
#include "cpu/linear_kl_div/linear_kl_div.h"
#include "cpu/peaks/peaks.h"
#include "cpu/scale_search/scale_search.h"
#include "cpu/sparse24_int4_linear/sparse24_int4_linear.h"
#include "cpu/sparse24_linear/sparse24_linear.h"
#include "cpu/sparsegpt_block/sparsegpt_block.h"

namespace py = pybind11;

namespace llmkern {
namespace {

using Address = uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Defines `op.level(x, x_dtype, bias, bias_dtype, y, m, n, k, threads, *weight)`; make(LinearArgs, weight...) gives
// the op's own arguments.
template <class Args, class... Weight>
void def_linear(py::module_& op, const char* level, void (*run)(const Args&), Args (*make)(LinearArgs, Weight...)) {
    op.def(
        level,
        [run, make](Address x, int x_dtype, Address bias, int bias_dtype, Address y, int64_t m, int64_t n, int64_t k,
                    int threads, Weight... weight) {
            const LinearArgs linear{at<void>(x), DType(x_dtype), at<void>(bias), DType(bias_dtype), at<void>(y), m, n,
                                    k,           threads};
            run(make(linear, weight...));
        },
        NoGil());
}

Int8LinearArgs int8_args(LinearArgs linear, Address codes, Address scales, int scales_dtype, Address zeros,
                         int64_t group_size) {
    return {linear, at<int8_t>(codes), at<void>(scales), DType(scales_dtype), at<int8_t>(zeros), group_size};
}

Int4LinearArgs int4_args(LinearArgs linear, Address words, Address scales, int scales_dtype, Address zeros,
                         int64_t group_size, bool int8_activations) {
    return {linear,     at<uint8_t>(words), at<void>(scales), DType(scales_dtype), at<int8_t>(zeros),
            group_size, int8_activations};
}

Sparse24LinearArgs sparse24_args(LinearArgs linear, Address values, int values_dtype, Address positions, Address scales,
                                 int scales_dtype, int64_t group_size) {
    return {linear,           at<void>(values),    DType(values_dtype), at<uint8_t>(positions),
            at<void>(scales), DType(scales_dtype), group_size};
}

Sparse24Int4LinearArgs sparse24_int4_args(LinearArgs linear, Address words, Address positions, Address scales,
                                          int scales_dtype, int64_t group_size) {
    return {linear, at<int32_t>(words), at<uint8_t>(positions), at<void>(scales), DType(scales_dtype), group_size};
}

BitmaskLinearArgs bitmask_args(LinearArgs linear, Address values, int values_dtype, Address bits, Address row_offsets,
                               Address scales, int scales_dtype, int64_t group_size) {
    return {linear,           at<void>(values),    DType(values_dtype), at<uint8_t>(bits), at<int64_t>(row_offsets),
            at<void>(scales), DType(scales_dtype), group_size};
}

void def_gptq_block(py::module_& op, const char* level, void (*run)(const ColumnArgs&)) {
    op.def(
        level,
        [run](Address w, Address wc, Address v, Address scales, Address zeros, Address group, Address mask, Address q,
              int64_t n, int64_t b, int64_t groups, int bits, int threads) {
            ColumnArgs args{};
            args.w = at<float>(w), args.wc = at<float>(wc), args.v = at<float>(v), args.mask = at<bool>(mask);
            args.scales = at<float>(scales), args.zeros = at<int8_t>(zeros), args.group = at<int32_t>(group);
            args.q = at<float>(q), args.n = n, args.b = b, args.groups = groups;
            args.bits = bits, args.threads = threads;
            run(args);
        },
        NoGil());
}

void def_sparsegpt_block(py::module_& op, const char* level, void (*run)(const ColumnArgs&)) {
    op.def(
        level,
        [run](Address w, Address wc, Address v, Address diagonal, Address mask, int prune_n, int prune_m,
              Address scales, Address zeros, Address group, Address q, Address keep, int64_t n, int64_t b,
              int64_t groups, int bits, int threads) {
            ColumnArgs args{};
            args.w = at<float>(w), args.wc = at<float>(wc), args.v = at<float>(v);
            args.diagonal = at<float>(diagonal), args.mask = at<bool>(mask);
            args.prune_n = prune_n, args.prune_m = mask ? 0 : prune_m;
            args.scales = at<float>(scales), args.zeros = at<int8_t>(zeros), args.group = at<int32_t>(group);
            args.q = at<float>(q), args.keep = at<bool>(keep), args.n = n, args.b = b, args.groups = groups;
            args.bits = bits, args.threads = threads;
            run(args);
        },
        NoGil());
}

void def_scale_search(py::module_& op, const char* level, void (*run)(const ScaleSearchArgs&)) {
    op.def(
        level,
        [run](Address w, Address importance, Address scales, Address zeros, int64_t n, int64_t k, int64_t group_size,
              int bits, bool symmetric, int steps, double smallest, int threads) {
            run({at<float>(w), at<float>(importance), at<float>(scales), at<int8_t>(zeros), n, k, group_size, bits,
                 symmetric, steps, smallest, threads});
        },
        NoGil());
}

void def_linear_kl_div(py::module_& op, const char* level, void (*run)(const LinearKlDivArgs&)) {
    op.def(
        level,
        [run](Address student, int student_dtype, Address teacher, int teacher_dtype, Address indices,
              Address log_probs, Address labels, Address stats, int64_t n, int64_t v, int64_t k, int kind, float mix,
              float temperature, float divergence_weight, float ce_weight, float softcap, float teacher_softcap,
              bool tail, bool gradient, int threads) {
            LinearKlDivArgs args{};
            args.student = at<void>(student), args.student_dtype = DType(student_dtype);
            args.teacher = at<void>(teacher), args.teacher_dtype = DType(teacher_dtype);
            args.indices = at<int64_t>(indices), args.log_probs = at<float>(log_probs);
            args.labels = at<int64_t>(labels), args.stats = at<float>(stats), args.n = n, args.v = v, args.k = k;
            args.kind = Divergence(kind), args.mix = mix, args.temperature = temperature;
            args.divergence_weight = divergence_weight, args.ce_weight = ce_weight;
            args.softcap = softcap, args.teacher_softcap = teacher_softcap;
            args.tail = tail, args.gradient = gradient, args.threads = threads;
            run(args);
        },
        NoGil());
}

void def_peaks(py::module_& peaks, const char* level, double (*multiply_add)(Factors, int64_t, int),
               void (*read)(const void*, int64_t, int64_t, int64_t, int)) {
    py::module_ mine = peaks.def_submodule(level);
    mine.def(
        "multiply_add",
        [multiply_add](int factors, int64_t rounds, int threads) {
            return multiply_add(Factors(factors), rounds, threads);
        },
        NoGil());
    mine.def(
        "read",
        [read](Address data, int64_t bytes, int64_t streams, int64_t ahead, int threads) {
            read(at<void>(data), bytes, streams, ahead, threads);
        },
        NoGil());
}

py::list levels_list() {
    py::list rows;
    for (const Level& level : levels()) rows.append(py::make_tuple(level.name, level.available, level.flags));
    return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "llmkern's native CPU kernels; call them through llmkern.ops.";
    m.def("levels", levels_list, "(name, available here, compile flags) of every CPU level, lowest first.");
    m.def("fast_bf16_products", fast_bf16_products, "Whether avx512_bf16, where it is, beats fp32.");

    py::module_ int8_linear_module = m.def_submodule("int8_linear");
#define LLMKERN_KERNEL(level) def_linear(int8_linear_module, #level, level::int8_linear, int8_args);
#include "cpu/int8_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ int8_dynamic_linear_module = m.def_submodule("int8_dynamic_linear");
#define LLMKERN_KERNEL(level) def_linear(int8_dynamic_linear_module, #level, level::int8_dynamic_linear, int8_args);
#include "cpu/int8_dynamic_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ int4_linear_module = m.def_submodule("int4_linear");
#define LLMKERN_KERNEL(level) def_linear(int4_linear_module, #level, level::int4_linear, int4_args);
#include "cpu/int4_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ sparse24_linear_module = m.def_submodule("sparse24_linear");
#define LLMKERN_KERNEL(level) def_linear(sparse24_linear_module, #level, level::sparse24_linear, sparse24_args);
#include "cpu/sparse24_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ sparse24_int4_linear_module = m.def_submodule("sparse24_int4_linear");
#define LLMKERN_KERNEL(level) \
    def_linear(sparse24_int4_linear_module, #level, level::sparse24_int4_linear, sparse24_int4_args);
#include "cpu/sparse24_int4_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ bitmask_linear_module = m.def_submodule("bitmask_linear");
#define LLMKERN_KERNEL(level) def_linear(bitmask_linear_module, #level, level::bitmask_linear, bitmask_args);
#include "cpu/bitmask_linear/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ gptq_block_module = m.def_submodule("gptq_block");
#define LLMKERN_KERNEL(level) def_gptq_block(gptq_block_module, #level, level::gptq_block);
#include "cpu/gptq_block/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ sparsegpt_block_module = m.def_submodule("sparsegpt_block");
#define LLMKERN_KERNEL(level) def_sparsegpt_block(sparsegpt_block_module, #level, level::sparsegpt_block);
#include "cpu/sparsegpt_block/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ scale_search_module = m.def_submodule("scale_search");
#define LLMKERN_KERNEL(level) def_scale_search(scale_search_module, #level, level::scale_search);
#include "cpu/scale_search/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ linear_kl_div_module = m.def_submodule("linear_kl_div");
#define LLMKERN_KERNEL(level) def_linear_kl_div(linear_kl_div_module, #level, level::linear_kl_div);
#include "cpu/linear_kl_div/kernels.def"
#undef LLMKERN_KERNEL

    py::module_ peaks = m.def_submodule("peaks");
#define LLMKERN_PEAKS(level) def_peaks(peaks, #level, level::multiply_add, level::read);
#include "cpu/peaks/peaks.def"
#undef LLMKERN_PEAKS
}

}  // namespace llmkern
