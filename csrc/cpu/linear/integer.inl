// Linear layers with x quantized to int8: exact int32 dot products per weight group, scaled and summed in fp32.
//
//   y[m, n] = sum over groups g of (sum over k in g of (q[n, k] - z[n, g]) * c[m, k]) * sw[n, g] * sx[m, g]
//
// A weight format gives Rows: row(n) and row_bytes(), code(row, column), Dot, the level's dot product along rows as
// they are stored, and Tile, its product on turned ones.
//
//   few rows of x     integer_fast.inl        AVX2: scaled lane by lane
//                     integer_quad.inl        AArch64: four rows of w at a time, scaled once per group
//                     integer_quad_wide.inl   AVX-512: likewise in each of four parts of a register
//                     integer_lanes_wide.inl  AVX-512, groups of one or two lanes: scaled lane by lane
//   more              integer_tile.inl, and amx_integer.inl where the level has tiles of its own
//   other groups      here: a row is decoded to 16-bit centred codes once, and used for all rows of x
//
// Included inside namespace llmkern::LLMKERN_NS by linear/integer.h.

// x of so many rows stays in the outer cache beside the weights that go by: 1 and 4 MiB for 4096 columns.
constexpr int64_t INTEGER_BLOCK_M = REGISTERS == 16 ? 256 : 1024;

// Rows [m0, m0 + rows) of x, quantized: arrange(i, codes, scales) stores what row m0 + i became. Codes are followed by
// zeros to a multiple of 128.
template <class Arrange>
void quantize_rows(const LinearArgs& a, int64_t x_group, int64_t m0, int64_t rows, int threads, Arrange arrange) {
    const int64_t room = round_up(a.k, 128) + F32::WIDTH, groups = (a.k + x_group - 1) / x_group;
    parallel_for(rows, rows < 4 ? 1 : threads, [&](int64_t begin, int64_t end) {
        Carver carve(scratch(Scratch::TASK,
                             Carver::bytes<float>(room) + Carver::bytes<int8_t>(room) + Carver::bytes<float>(groups)));
        float* row = carve.take<float>(room);
        int8_t* codes = carve.take<int8_t>(room);
        float* scales = carve.take<float>(groups);
        for (int64_t i = a.k; i < room; ++i) row[i] = 0, codes[i] = 0;
        for (int64_t i = begin; i < end; ++i) {
            quantize_row(a, m0 + i, x_group, row, codes, scales);
            arrange(i, codes, scales);
        }
    });
}

// ---- 16-bit codes: any level, any groups ----

// dots[i] = w[0..count) times x row i, for ROWS rows `ld` apart.
template <int ROWS>
LLMKERN_INLINE void dot16(const int16_t* w, const int16_t* x, int64_t ld, int64_t count, int32_t* dots) {
    int32_t sums[ROWS] = {};
    for (int64_t k = 0; k < count; ++k)
        for (int i = 0; i < ROWS; ++i) sums[i] += static_cast<int32_t>(w[k]) * x[i * ld + k];
    for (int i = 0; i < ROWS; ++i) dots[i] = sums[i];
}

template <class Rows>
void run_integer_any(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    const int64_t groups = (a.k + g.group_size - 1) / g.group_size, x_groups = (a.k + x_group - 1) / x_group;
    const int64_t ld = round_up(a.k, 32);
    for (int64_t m0 = 0; m0 < a.m; m0 += INTEGER_BLOCK_M) {
        const int64_t block = a.m - m0 < INTEGER_BLOCK_M ? a.m - m0 : INTEGER_BLOCK_M;
        Carver carve(
            scratch(Scratch::CALL, Carver::bytes<int16_t>(block * ld) + Carver::bytes<float>(block * x_groups)));
        int16_t* x = carve.take<int16_t>(block * ld);
        float* x_scales = carve.take<float>(block * x_groups);
        quantize_rows(a, x_group, m0, block, threads, [&](int64_t i, const int8_t* codes, const float* scales) {
            for (int64_t k = 0; k < a.k; ++k) x[i * ld + k] = codes[k];
            for (int64_t j = 0; j < x_groups; ++j) x_scales[i * x_groups + j] = scales[j];
        });
        parallel_for(a.n, threads, [&](int64_t begin, int64_t end) {
            Carver task(scratch(Scratch::TASK, Carver::bytes<int16_t>(ld) + Carver::bytes<float>(groups)));
            int16_t* w = task.take<int16_t>(ld);
            float* w_scales = task.take<float>(groups);
            for (int64_t n = begin; n < end; ++n) {
                convert_row(w_scales, g.scales, g.scales_dtype, n * groups, groups);
                for (int64_t j = 0; j < groups; ++j) {
                    const int64_t k1 = (j + 1) * g.group_size < a.k ? (j + 1) * g.group_size : a.k;
                    const int16_t zero = g.zeros ? g.zeros[n * groups + j] : int16_t{0};
                    for (int64_t k = j * g.group_size; k < k1; ++k)
                        w[k] = static_cast<int16_t>(weight.code(weight.row(n), k) - zero);
                }
                const float bias = a.bias ? load_one(a.bias, a.bias_dtype, n) : 0.0f;
                for (int64_t m = 0; m < block; m += 4) {
                    const int count = static_cast<int>(block - m < 4 ? block - m : 4);
                    float sums[4] = {};
                    for (int64_t j = 0; j < groups; ++j) {
                        const int64_t k0 = j * g.group_size, left = a.k - k0;
                        const int64_t columns = left < g.group_size ? left : g.group_size;
                        int32_t dots[4];
                        if (count == 4)
                            dot16<4>(w + k0, x + m * ld + k0, ld, columns, dots);
                        else
                            for (int i = 0; i < count; ++i)
                                dot16<1>(w + k0, x + (m + i) * ld + k0, ld, columns, dots + i);
                        for (int i = 0; i < count; ++i)
                            sums[i] +=
                                static_cast<float>(dots[i]) * x_scales[(m + i) * x_groups + k0 / x_group] * w_scales[j];
                    }
                    for (int i = 0; i < count; ++i) store_one(a.y, a.x_dtype, (m0 + m + i) * a.n + n, sums[i] + bias);
                }
            }
        });
    }
}
