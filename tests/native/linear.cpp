// Every linear op at every level of this machine against double precision: sizes and groups around each edge of the
// kernels, 1 to 33 rows of x and 65, every dtype, outputs filled with NaN before.
#include <functional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/bitmask_linear/bitmask_linear.h"
#include "cpu/int4_linear/int4_linear.h"
#include "cpu/int8_dynamic_linear/int8_dynamic_linear.h"
#include "cpu/int8_linear/int8_linear.h"
#include "cpu/sparse24_int4_linear/sparse24_int4_linear.h"
#include "cpu/sparse24_linear/sparse24_linear.h"

namespace checks {
namespace {

using namespace llmkern;

constexpr int64_t MOST_ROWS = 65;

struct Shape {
    int64_t n, k, group_size;  // group_size 0: one group per row
};

// One element, odd sizes, whole registers, short last groups, groups within and of several chunks.
const Shape SHAPES[] = {
    {1, 1, 0},        {7, 13, 0},   {7, 13, 4},     {33, 75, 32},   {33, 75, 20},   {4, 64, 32},
    {64, 576, 128},   {64, 576, 0}, {64, 576, 64},  {17, 260, 100}, {129, 260, 32}, {5, 2085, 128},
    {70, 1501, 1000}, {3, 96, 16},  {50, 1040, 16}, {19, 48, 8},    {18, 264, 24},  {13, 544, 0},
};

// A weight as one op takes it, and what it means.
struct Weight {
    Shape shape;
    std::string text;
    std::vector<double> dense;     // [n][k]
    std::vector<double> integers;  // [n][k]: code less zero point; integer ops only
    std::vector<double> scales;    // [n][groups]
    int64_t x_group = 0;           // columns of x that are quantized together; 0: x is kept
    bool whole_rows_may_vanish = false;
    std::vector<std::shared_ptr<Array>> arrays;
    // level -> the kernel on these arguments
    std::vector<std::pair<std::string, std::function<void(const LinearArgs&)>>> kernels;

    int64_t group() const { return shape.group_size ? shape.group_size : shape.k; }
    int64_t groups() const { return (shape.k + group() - 1) / group(); }

    Array& add(DType dtype, int64_t count) {
        arrays.push_back(std::make_shared<Array>(dtype, count));
        return *arrays.back();
    }

    template <class Args>
    void add_kernel(const char* level, void (*run)(const Args&), Args args) {
        kernels.emplace_back(level, [run, args](const LinearArgs& linear) {
            Args all = args;
            all.linear = linear;
            run(all);
        });
    }
};

Array& make_scales(Weight& weight, DType dtype, double size, Random& random) {
    Array& scales = weight.add(dtype, weight.shape.n * weight.groups());
    for (int64_t i = 0; i < scales.count(); ++i) {
        scales.set(i, (random.uniform() + 0.5) / size);
        weight.scales.push_back(scales.get(i));
    }
    return scales;
}

// code(row, column) for int8 and int4 codes with or without zero points of the same range.
Array* make_grid(Weight& weight, int half, bool zeros, DType dtype, Random& random,
                 const std::function<int(int64_t, int64_t)>& code) {
    const Shape& s = weight.shape;
    make_scales(weight, dtype, half, random);
    Array* points = zeros ? &weight.add(DType::I8, s.n * weight.groups()) : nullptr;
    for (int64_t i = 0; points && i < points->count(); ++i)
        points->set(i, static_cast<double>(random.below(2 * half) - half));
    for (int64_t n = 0; n < s.n; ++n)
        for (int64_t k = 0; k < s.k; ++k) {
            const int64_t at = n * weight.groups() + k / weight.group();
            weight.integers.push_back(code(n, k) - (points ? points->get(at) : 0));
            weight.dense.push_back(weight.integers.back() * weight.scales[static_cast<size_t>(at)]);
        }
    return points;
}

Weight int8_weight(Shape shape, bool dynamic, bool zeros, DType scales_dtype, Random& random) {
    Weight weight;
    weight.shape = shape;
    Array& codes = weight.add(DType::I8, shape.n * shape.k);
    for (int64_t i = 0; i < codes.count(); ++i) codes.set(i, static_cast<double>(random.below(256) - 128));
    const Array* points = make_grid(weight, 128, zeros, scales_dtype, random,
                                    [&](int64_t n, int64_t k) { return static_cast<int>(codes.get(n * shape.k + k)); });
    const Int8LinearArgs args{{},
                              codes.data<int8_t>(),
                              weight.arrays[1]->data(),
                              scales_dtype,
                              points ? points->data<int8_t>() : nullptr,
                              weight.group()};
    if (dynamic) {
        weight.x_group = shape.k;
#define LLMKERN_KERNEL(level) weight.add_kernel(#level, level::int8_dynamic_linear, args);
#include "cpu/int8_dynamic_linear/kernels.def"
#undef LLMKERN_KERNEL
    } else {
#define LLMKERN_KERNEL(level) weight.add_kernel(#level, level::int8_linear, args);
#include "cpu/int8_linear/kernels.def"
#undef LLMKERN_KERNEL
    }
    weight.text = dynamic ? "int8_dynamic_linear" : "int8_linear";
    return weight;
}

Weight int4_weight(Shape shape, bool int8_activations, bool zeros, DType scales_dtype, Random& random) {
    Weight weight;
    weight.shape = shape;
    const int64_t row_bytes = (shape.k + 7) / 8 * 4;
    Array& nibbles = weight.add(DType::I8, shape.n * row_bytes);
    uint8_t* bytes = nibbles.data<uint8_t>();
    for (int64_t i = 0; i < nibbles.count(); ++i) bytes[i] = static_cast<uint8_t>(random.bits());
    const Array* points = make_grid(weight, 8, zeros, scales_dtype, random, [&](int64_t n, int64_t k) {
        return (bytes[n * row_bytes + k / 2] >> k % 2 * 4 & 15) - 8;
    });
    const Int4LinearArgs args{{},
                              bytes,
                              weight.arrays[1]->data(),
                              scales_dtype,
                              points ? points->data<int8_t>() : nullptr,
                              weight.group(),
                              int8_activations};
    weight.x_group = int8_activations ? weight.group() : 0;
#define LLMKERN_KERNEL(level) weight.add_kernel(#level, level::int4_linear, args);
#include "cpu/int4_linear/kernels.def"
#undef LLMKERN_KERNEL
    weight.text = int8_activations ? "int4_linear (int8 activations)" : "int4_linear";
    return weight;
}

// Kept value i of a row of sparse codes or floats, scaled.
double kept_value(const Weight& weight, const Array& values, int64_t i, int64_t n, int64_t k) {
    if (weight.scales.empty()) return values.get(i);
    return values.get(i) * weight.scales[static_cast<size_t>(n * weight.groups() + k / weight.group())];
}

// Positions [n][ceil(k / 8)]; each(n, column, i) for the i-th kept value of a row.
Array& make_positions(Weight& weight, Random& random, const std::function<void(int64_t, int64_t, int64_t)>& each) {
    const Shape& s = weight.shape;
    Array& positions = weight.add(DType::I8, s.n * ((s.k + 7) / 8));
    positions.fill(0);
    for (int64_t n = 0; n < s.n; ++n)
        for (int64_t quad = 0; quad < (s.k + 3) / 4; ++quad) {
            const int64_t second = 1 + random.below(3), first = random.below(second);
            positions.data<uint8_t>()[n * ((s.k + 7) / 8) + quad / 2] |=
                static_cast<uint8_t>((first | second << 2) << quad % 2 * 4);
            each(n, 4 * quad + first, 2 * quad);
            each(n, 4 * quad + second, 2 * quad + 1);
        }
    return positions;
}

Weight sparse24_weight(Shape shape, DType values_dtype, DType scales_dtype, Random& random) {
    Weight weight;
    weight.shape = shape;
    const int64_t row = (shape.k + 3) / 4 * 2;
    weight.arrays.push_back(random_array(values_dtype, shape.n * row, random));
    const Array& values = *weight.arrays[0];
    const void* scales = values_dtype == DType::I8 ? make_scales(weight, scales_dtype, 128, random).data() : nullptr;
    weight.dense.assign(static_cast<size_t>(shape.n * shape.k), 0.0);
    const Array& positions = make_positions(weight, random, [&](int64_t n, int64_t k, int64_t i) {
        if (k < shape.k)
            weight.dense[static_cast<size_t>(n * shape.k + k)] = kept_value(weight, values, n * row + i, n, k);
    });
    const Sparse24LinearArgs args{{},     values.data(), values_dtype,  positions.data<uint8_t>(),
                                  scales, scales_dtype,  weight.group()};
#define LLMKERN_KERNEL(level) weight.add_kernel(#level, level::sparse24_linear, args);
#include "cpu/sparse24_linear/kernels.def"
#undef LLMKERN_KERNEL
    weight.text = std::string("sparse24_linear ") + name_of(values_dtype);
    weight.whole_rows_may_vanish = true;
    return weight;
}

Weight sparse24_int4_weight(Shape shape, DType scales_dtype, Random& random) {
    Weight weight;
    weight.shape = shape;
    const int64_t row = ((shape.k + 3) / 4 * 2 + 7) / 8 * 4;
    Array& words = weight.add(DType::I8, shape.n * row);
    uint8_t* bytes = words.data<uint8_t>();
    for (int64_t i = 0; i < words.count(); ++i) bytes[i] = static_cast<uint8_t>(random.bits());
    const Array& scales = make_scales(weight, scales_dtype, 8, random);
    weight.dense.assign(static_cast<size_t>(shape.n * shape.k), 0.0);
    const Array& positions = make_positions(weight, random, [&](int64_t n, int64_t k, int64_t i) {
        if (k >= shape.k) return;
        const int code = (bytes[n * row + i / 2] >> i % 2 * 4 & 15) - 8;
        weight.dense[static_cast<size_t>(n * shape.k + k)] =
            code * weight.scales[static_cast<size_t>(n * weight.groups() + k / weight.group())];
    });
    const Sparse24Int4LinearArgs args{{},           words.data<int32_t>(), positions.data<uint8_t>(), scales.data(),
                                      scales_dtype, weight.group()};
#define LLMKERN_KERNEL(level) weight.add_kernel(#level, level::sparse24_int4_linear, args);
#include "cpu/sparse24_int4_linear/kernels.def"
#undef LLMKERN_KERNEL
    weight.text = "sparse24_int4_linear";
    weight.whole_rows_may_vanish = true;
    return weight;
}

// Row 0 is empty, row 1 full, row 2 keeps its last column only; the others are as dense as they come.
Weight bitmask_weight(Shape shape, DType values_dtype, DType scales_dtype, Random& random) {
    Weight weight;
    weight.shape = shape;
    const int64_t row_bytes = (shape.k + 7) / 8;
    auto offsets = std::make_shared<Array>(DType::F32, 2 * (shape.n + 1));
    auto bits = std::make_shared<Array>(DType::I8, shape.n * row_bytes);
    bits->fill(0);
    std::vector<int64_t> columns;
    offsets->data<int64_t>()[0] = 0;
    for (int64_t n = 0; n < shape.n; ++n) {
        const double density = shape.n < 3 ? 0.5 : n == 0 ? 0 : n == 1 ? 1 : random.uniform();
        for (int64_t k = 0; k < shape.k; ++k) {
            if (shape.n >= 3 && n == 2 ? k != shape.k - 1 : random.uniform() >= density) continue;
            bits->data<uint8_t>()[n * row_bytes + k / 8] |= static_cast<uint8_t>(1 << k % 8);
            columns.push_back(k);
        }
        offsets->data<int64_t>()[n + 1] = static_cast<int64_t>(columns.size());
    }
    weight.arrays = {random_array(values_dtype, static_cast<int64_t>(columns.size()), random), offsets, bits};
    const Array& values = *weight.arrays[0];
    const void* scales = values_dtype == DType::I8 ? make_scales(weight, scales_dtype, 128, random).data() : nullptr;
    weight.dense.assign(static_cast<size_t>(shape.n * shape.k), 0.0);
    for (int64_t n = 0; n < shape.n; ++n)
        for (int64_t i = offsets->data<int64_t>()[n]; i < offsets->data<int64_t>()[n + 1]; ++i) {
            const int64_t k = columns[static_cast<size_t>(i)];
            weight.dense[static_cast<size_t>(n * shape.k + k)] = kept_value(weight, values, i, n, k);
        }
    const BitmaskLinearArgs args{{},     values.data(), values_dtype,  bits->data<uint8_t>(), offsets->data<int64_t>(),
                                 scales, scales_dtype,  weight.group()};
#define LLMKERN_KERNEL(level) weight.add_kernel(#level, level::bitmask_linear, args);
#include "cpu/bitmask_linear/kernels.def"
#undef LLMKERN_KERNEL
    weight.text = std::string("bitmask_linear ") + name_of(values_dtype);
    weight.whole_rows_may_vanish = true;
    return weight;
}

// What y should be, and how far fp32 arithmetic may be from it; without the bias.
struct Expected {
    std::vector<double> y, tolerance;
};

Expected expect_kept(const Weight& weight, const Array& x, int64_t rows) {
    const Shape& s = weight.shape;
    Expected expected;
    double largest_x = 0, largest_w = 0;
    for (int64_t i = 0; i < x.count(); ++i) largest_x = std::fmax(largest_x, std::fabs(x.get(i)));
    for (const double w : weight.dense) largest_w = std::fmax(largest_w, std::fabs(w));
    const double step = 4 * 0x1p-23 * std::sqrt(static_cast<double>(s.k)) * largest_x * largest_w;
    std::vector<double> row(static_cast<size_t>(s.k));
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t k = 0; k < s.k; ++k) row[static_cast<size_t>(k)] = x.get(m * s.k + k);
        for (int64_t n = 0; n < s.n; ++n) {
            const double* w = &weight.dense[static_cast<size_t>(n * s.k)];
            double sum = 0;
            for (int64_t k = 0; k < s.k; ++k) sum += row[static_cast<size_t>(k)] * w[k];
            expected.y.push_back(sum);
            expected.tolerance.push_back(step);
        }
    }
    return expected;
}

// The quantization of x is repeated in fp32, as it is defined; from there on everything but the scaling is exact.
Expected expect_quantized(const Weight& weight, const Array& x, int64_t rows) {
    const Shape& s = weight.shape;
    Expected expected;
    std::vector<double> codes(static_cast<size_t>(s.k)), units(static_cast<size_t>(s.k));
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t k0 = 0; k0 < s.k; k0 += weight.x_group) {
            const int64_t k1 = k0 + weight.x_group < s.k ? k0 + weight.x_group : s.k;
            float largest = 0;
            for (int64_t k = k0; k < k1; ++k)
                largest = std::fmax(largest, std::fabs(static_cast<float>(x.get(m * s.k + k))));
            const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
            for (int64_t k = k0; k < k1; ++k) {
                const float scaled = static_cast<float>(x.get(m * s.k + k)) * inverse;
                codes[static_cast<size_t>(k)] = std::nearbyint(scaled);
                units[static_cast<size_t>(k)] = largest / 127.0f;
            }
        }
        for (int64_t n = 0; n < s.n; ++n) {
            const double* w = &weight.integers[static_cast<size_t>(n * s.k)];
            double sum = 0, size = 0;
            for (int64_t k0 = 0; k0 < s.k; k0 += weight.group()) {
                const int64_t k1 = k0 + weight.group() < s.k ? k0 + weight.group() : s.k;
                double dot = 0, all = 0, most = 0;
                for (int64_t k = k0; k < k1; ++k) {
                    dot += codes[static_cast<size_t>(k)] * w[k];
                    all += codes[static_cast<size_t>(k)];
                    most = std::fmax(most, std::fabs(w[k]));
                }
                const double unit = units[static_cast<size_t>(k0)] *
                                    weight.scales[static_cast<size_t>(n * weight.groups() + k0 / weight.group())];
                sum += dot * unit;
                size += (std::fabs(dot) + std::fabs(all) * most) * unit;
            }
            expected.y.push_back(sum);
            expected.tolerance.push_back(4 * 0x1p-23 * size);
        }
    }
    return expected;
}

void compare(const Weight& weight, const char* level, const Array& x, const Array* bias, const Expected& expected,
             const std::function<void(const LinearArgs&)>& run, int64_t m) {
    const Shape& s = weight.shape;
    Array y(x.dtype(), m * s.n);
    y.fill(0xff);  // NaN in every dtype
    // x of m rows ends where it may be read to.
    Array rows(x.dtype(), m * s.k);
    std::memcpy(rows.data(), x.data(), static_cast<size_t>(m * s.k * size_of(x.dtype())));
    const int threads = m % 2 ? 1 : 2;
    run({rows.data(), x.dtype(), bias ? bias->data() : nullptr, bias ? bias->dtype() : DType::F32, y.data(), m, s.n,
         s.k, threads});
    double worst = 0;
    int64_t at = 0;
    for (int64_t i = 0; i < m * s.n; ++i) {
        const double extra = bias ? bias->get(i % s.n) : 0, exact = expected.y[static_cast<size_t>(i)] + extra;
        const double tolerance = expected.tolerance[static_cast<size_t>(i)] + 4 * 0x1p-23 * std::fabs(extra) +
                                 (0.5 * epsilon(x.dtype()) + 2 * 0x1p-23) * std::fabs(exact) + 0x1p-25;
        const double error = std::fabs(y.get(i) - exact) / tolerance;
        if (!(error <= worst)) worst = error, at = i;
        if (worst != worst) break;
    }
    check(
        worst <= 1,
        "%s on %s, %ld x %ld, groups of %ld, x %s, M = %ld: y[%ld, %ld] is %g, wanted %g (+ bias), %g of the tolerance",
        weight.text.c_str(), level, s.n, s.k, weight.group(), name_of(x.dtype()), m, at / s.n, at % s.n, y.get(at),
        expected.y[static_cast<size_t>(at)], worst);
}

// A row of NaN gives a row of NaN and changes no other.
void check_nan(const Weight& weight, const char* level, const Array& x,
               const std::function<void(const LinearArgs&)>& run, int64_t m) {
    const Shape& s = weight.shape;
    Array rows(x.dtype(), m * s.k), y(x.dtype(), m * s.n);
    for (int64_t i = 0; i < rows.count(); ++i) rows.set(i, i / s.k == m / 2 ? NAN : x.get(i));
    run({rows.data(), x.dtype(), nullptr, DType::F32, y.data(), m, s.n, s.k, 1});
    bool ok = true;
    for (int64_t i = 0; i < y.count(); ++i) {
        const bool nan = std::isnan(y.get(i));
        ok = ok && (i / s.n == m / 2 ? nan || weight.whole_rows_may_vanish : !nan);
    }
    check(ok, "%s on %s, %ld x %ld, x %s: a row of NaN, M = %ld", weight.text.c_str(), level, s.n, s.k,
          name_of(x.dtype()), m);
}

// Small weights with every number of rows and dtype of x, large ones (emulators are slow) with some and one dtype.
void check_weight(const Weight& weight, Random& random) {
    const Shape& s = weight.shape;
    const bool large = s.n * s.k > 4000;
    std::vector<int64_t> all{MOST_ROWS};
    for (int64_t m = 1; m <= 33; ++m) all.push_back(m);
    const std::vector<int64_t> some{1, 2, 3, 4, 5, 6, 9, 11, 13, 33};
    const int64_t only = random.below(3);
    for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
        if (large && static_cast<int64_t>(dtype) != only) continue;
        const auto x = random_array(dtype, MOST_ROWS * s.k, random);
        const auto bias = random_array(static_cast<DType>(random.below(3)), s.n, random);
        const Expected expected = weight.x_group ? expect_quantized(weight, *x, large ? 33 : MOST_ROWS)
                                                 : expect_kept(weight, *x, large ? 33 : MOST_ROWS);
        for (const auto& [level, run] : weight.kernels) {
            if (!runs_here(level.c_str())) continue;
            for (const int64_t m : large ? some : all)
                compare(weight, level.c_str(), *x, m % 3 ? bias.get() : nullptr, expected, run, m);
            for (const int64_t m : {1, 3, 7, 20}) check_nan(weight, level.c_str(), *x, run, m);
        }
    }
}

}  // namespace

void check_linear_ops() {
    Random random(1);
    const DType floats[] = {DType::F32, DType::BF16, DType::F16};
    int64_t turn = 0;
    for (const Shape& shape : SHAPES) {
        const DType scales = floats[turn++ % 3];
        for (const bool zeros : {false, true}) {
            check_weight(int8_weight(shape, false, zeros, scales, random), random);
            check_weight(int8_weight(shape, true, zeros, scales, random), random);
            check_weight(int4_weight(shape, false, zeros, scales, random), random);
            check_weight(int4_weight(shape, true, zeros, scales, random), random);
        }
        for (const DType values : {DType::F32, DType::BF16, DType::F16, DType::I8}) {
            if (shape.group_size % 4 == 0) check_weight(sparse24_weight(shape, values, scales, random), random);
            check_weight(bitmask_weight(shape, values, scales, random), random);
        }
        if (shape.group_size % 4 == 0) check_weight(sparse24_int4_weight(shape, scales, random), random);
    }
}

}  // namespace checks
