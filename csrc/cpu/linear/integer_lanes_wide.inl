// The way of integer_quad_wide.inl for groups of one or two lanes: their scales are as many as there are lanes, or
// half, so that nothing is saved by adding lanes of four rows before they are scaled. Each lane is scaled as it is, and
// keeps to its columns to the end of the row.
//
//   a block of w, and its dots       n0 | a0 a1 a2 a3 ...    (* n0's scales | s0 s1 s2 s3 ... or | s0 s0 s1 s1 ...
//                                    n1 | b0 b1 b2 b3 ...       and x's, to n0's fp32 totals)
//
// Scales and zero points are read where they are stored, beside the codes: they are about as many bytes, and taken row
// by row beforehand, as for larger groups, they come at less of the bandwidth.
//
// Included inside namespace llmkern::LLMKERN_NS by linear/integer_quad_wide.inl.

// The scaled dot products of four rows of w and M of x, [row of x][row of w].
template <class Dot, bool ZEROS, int64_t AHEAD, int M>
LLMKERN_INLINE F32 multiply_lanes(const QuadW& w, const int8_t* x, const int32_t* starts, const float* x_scales,
                                  const uint8_t* const (&next)[2]) {
    F32 totals[M][QUAD];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < QUAD; ++r) totals[m][r] = zero();
    const GroupArgs& g = *w.stored;
    const I32 of_lanes = lane_groups(w.block_groups), offset = set1_i32(-Dot::OFFSET);
    for (int64_t b = 0; b < w.blocks; ++b) {
        typename Dot::Weights codes[QUAD];
        load_quad_block<Dot, AHEAD>(w, b, next, codes);
        // Lanes without columns get a scale of 0: the next row's could be NaN.
        const int64_t left = w.groups - b * w.block_groups;
        const Mask taken = first_lanes(static_cast<int>(left < w.block_groups ? left : w.block_groups));
        F32 scales[QUAD];
        I32 offsets[QUAD];
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; ++r) {
            const int64_t at = w.group + r * w.next_group + b * w.block_groups;
            scales[r] = permute(load_stored<INTEGER_AHEAD>(g.scales, g.scales_dtype, at, taken), of_lanes);
            if (ZEROS) offsets[r] = offset - permute(load_stored<INTEGER_AHEAD>(g.zeros + at, taken), of_lanes);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const int64_t at = b * QUAD_X_ROWS + m;
            const I32 start = load_i32(starts + at * F32::WIDTH);
            const F32 x_scale = load(x_scales + at * F32::WIDTH);
#pragma GCC unroll 4
            for (int r = 0; r < QUAD; ++r) {
                const I32 dots = Dot::add(ZEROS ? start * offsets[r] : start, codes[r], x + at * Dot::COLUMNS);
                totals[m][r] = fma(to_float(dots), scales[r] * x_scale, totals[m][r]);
            }
        }
    }
    F32 sums[QUAD_X_ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < QUAD_X_ROWS; ++m) sums[m] = m < M ? sums_of_rows(totals[m < M ? m : 0]) : zero();
    return sums_of_parts(sums);
}
