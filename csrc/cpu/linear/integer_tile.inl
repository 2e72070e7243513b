// The way of integer.inl for several rows of x: the weight is turned, block by block of K, into a tile whose registers
// hold one dword (Tile::STEP columns) of each of LANES rows, so that a dword of x, broadcast, is multiplied with
// LANES rows at once, and no sum ever crosses lanes.
//
//   w, as stored          tile: [step][VECTORS][LANES] dwords      x, in panels of up to X_ROWS rows
//     n0 | k0 k1 ...        step 0 | n0 n1 ... n15 | n16 ...         step 0 | m0 m1 ... m5 |
//     n1 | k0 k1 ...        step 1 | n0 n1 ... n15 | n16 ...         step 1 | m0 m1 ... m5 |
//
// A step is multiplied into X_ROWS * VECTORS registers of int32 sums. They start at -(OFFSET + zero point) * (the sum
// of the group's codes of x), and at the end of a group they are scaled and added to fp32 sums in memory. Where a block
// of K ends within a group, they wait in memory as they are: every group's dot product is an exact int32.
//
// A level gives a Tile per format, of codes in a row as stored:
//
//   struct Tile {
//       static constexpr bool FAST;             // false: the level has none, and nothing else is there
//       VECTORS, X_ROWS                         // registers of w, and rows of x, multiplied together
//       BYTES, COLUMNS                          // a chunk: bytes of a row, and the columns in them
//       STEP, UNIT                              // columns of a step; groups must be whole UNITs
//       OFFSET                                  // build() gives codes q + OFFSET
//       arrange(int8_t* codes, count)           // x's codes of a row in the order in which build() puts the columns
//       pack(codes, ld, rows, steps, to)        // rows of such codes, `ld` apart, as a panel
//       build(rows, bytes, to)                  // the first `bytes` of a chunk of LANES rows -> COLUMNS / STEP steps
//       multiply(sums, tile, x, steps)          // sums[ROWS][VECTORS] += steps of a tile times steps of x
//       turn(sums)                              // to the order in which multiply() wants the sums, and back; only
//   };                                          // where the level defines LLMKERN_TURNED_SUMS
//
// Included inside namespace llmkern::LLMKERN_NS by linear/integer.h.

// Columns of K in a tile: with 64 rows it takes 32 KiB of L1, beside a panel of x.
constexpr int64_t TILE_COLUMNS = 512;
// Steps between two looks ahead.
constexpr int64_t TILE_RUN = 16;
// Fewer rows of x than this in a task would spend too much of its time on building tiles.
constexpr int64_t TILE_TASK_ROWS = 96;

template <class Tile>
struct TileShape {
    static constexpr int LANES = F32::WIDTH, ROWS = LANES * Tile::VECTORS;
    static constexpr int64_t STEP_BYTES = 4 * ROWS;

    int64_t groups, group_steps, steps;
    int64_t block;  // steps of a block of K: whole chunks, and about the same in all blocks

    TileShape(int64_t k, int64_t group_size)
        : groups(div_up(k, group_size)),
          group_steps(groups > 1 ? group_size / Tile::STEP : INT64_MAX),
          steps(div_up(k, Tile::UNIT) * (Tile::UNIT / Tile::STEP)),
          block(round_up(div_up(k, div_up(k, TILE_COLUMNS)), Tile::COLUMNS) / Tile::STEP) {}

    int64_t block_end(int64_t begin) const { return begin + block < steps ? begin + block : steps; }
};

// x of one call.
struct TileX {
    const uint32_t* codes;  // [block of K][panel][step][row of the panel]
    const int32_t* sums;    // [row][groups] of x's codes, times -OFFSET unless there are zero points
    const float* scales;    // [row][x_groups]
    int64_t groups, x_groups;
    int64_t rows, panels;

    // Where block [begin, end) of K of the panel that starts with `row` is.
    int64_t at(int64_t begin, int64_t end, int64_t row) const { return begin * rows + row * (end - begin); }

    int64_t panel_row(int64_t panel) const { return rows * panel / panels; }
};

// The memory of a task.
struct TileMemory {
    uint8_t* tile;
    float* scales;     // [groups][ROWS]
    int32_t* offsets;  // [groups][ROWS]: -(OFFSET + zero point); only if there are zero points
    float* sums;       // [row][ROWS]
    int32_t* dots;     // [row][ROWS]: of a group that began in an earlier block
};

// What the next tile is built from, asked for while this one is multiplied: line `line` is of row line % ROWS.
struct TileAhead {
    const uint8_t* rows;
    int64_t row_bytes, line, lines, per_run;

    template <int ROWS>
    LLMKERN_INLINE_MEMBER void fetch() {
        const int64_t stop = line + per_run < lines ? line + per_run : lines;
        for (; line < stop; ++line) prefetch_far(rows + line % ROWS * row_bytes + line / ROWS * 64);
    }
};

// Steps [begin, end) of one panel.
template <class Tile, int R>
void multiply_panel(const TileShape<Tile>& shape, const TileX& x, const TileMemory& memory, int64_t row, int64_t first,
                    int64_t begin, int64_t end, TileAhead& ahead) {
    constexpr int V = Tile::VECTORS, W = F32::WIDTH, ROWS = TileShape<Tile>::ROWS;
    const uint32_t* codes = x.codes + x.at(begin, end, row);
    const uint8_t* tile = memory.tile;
    float* totals = memory.sums + (row - first) * ROWS;
    int32_t* waiting = memory.dots + (row - first) * ROWS;
    while (begin < end) {
        const int64_t group = begin / shape.group_steps;
        const int64_t group_end = group + 1 < shape.groups ? (group + 1) * shape.group_steps : shape.steps;
        const int64_t stop = group_end < end ? group_end : end;
        I32 dots[R][V];
        if (begin > group * shape.group_steps) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) dots[r][v] = load_i32(waiting + r * ROWS + v * W);
        } else if (memory.offsets) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const I32 sum = set1_i32(x.sums[(row + r) * x.groups + group]);
                for (int v = 0; v < V; ++v) dots[r][v] = sum * load_i32(memory.offsets + group * ROWS + v * W);
            }
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) dots[r][v] = set1_i32(x.sums[(row + r) * x.groups + group]);
        }
#ifdef LLMKERN_TURNED_SUMS
        Tile::turn(dots);
#endif
        while (begin < stop) {
            const int64_t steps = stop - begin < TILE_RUN ? stop - begin : TILE_RUN;
            ahead.fetch<ROWS>();
            Tile::template multiply<R>(dots, tile, codes, steps);
            tile += steps * TileShape<Tile>::STEP_BYTES;
            codes += steps * R;
            begin += steps;
        }
#ifdef LLMKERN_TURNED_SUMS
        Tile::turn(dots);
#endif
        if (stop < group_end) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) store_i32(waiting + r * ROWS + v * W, dots[r][v]);
            continue;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F32 x_scale = set1(x.scales[(row + r) * x.x_groups + (x.x_groups > 1 ? group : 0)]);
            for (int v = 0; v < V; ++v) {
                float* total = totals + r * ROWS + v * W;
                const F32 scale = x_scale * load(memory.scales + group * ROWS + v * W);
                store(total, fma(to_float(dots[r][v]), scale, group == 0 ? zero() : load(total)));
            }
        }
    }
}

template <class Tile, int R>
void multiply_panel_of(int rows, const TileShape<Tile>& shape, const TileX& x, const TileMemory& memory, int64_t row,
                       int64_t first, int64_t begin, int64_t end, TileAhead& ahead) {
    if constexpr (R > 1)
        if (rows < R) return multiply_panel_of<Tile, R - 1>(rows, shape, x, memory, row, first, begin, end, ahead);
    multiply_panel<Tile, R>(shape, x, memory, row, first, begin, end, ahead);
}

// Rows [n, n + count) of w, from byte `at` of each, as the tile's steps.
template <class Tile, class Rows>
void build_tile(const Rows& weight, int64_t n, int count, int64_t at, int64_t bytes, uint8_t* tile) {
    constexpr int LANES = F32::WIDTH;
    for (int v = 0; v < Tile::VECTORS; ++v) {
        const uint8_t* rows[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const int row = v * LANES + lane;
            rows[lane] = weight.row(n + (row < count ? row : count - 1)) + at;  // the last row again: never stored
        }
        uint8_t* to = tile + v * LANES * 4;
        for (int64_t b = 0; b < bytes; b += Tile::BYTES) {
            Tile::build(rows, static_cast<int>(bytes - b < Tile::BYTES ? bytes - b : Tile::BYTES), to);
            for (int lane = 0; lane < LANES; ++lane) rows[lane] += Tile::BYTES;
            to += Tile::COLUMNS / Tile::STEP * TileShape<Tile>::STEP_BYTES;
        }
    }
}

// The scales and offsets of rows [n, n + count) of w, group by group.
template <class Tile>
void gather_scales(const GroupArgs& g, int64_t n, int count, int64_t groups, float* row_scales,
                   const TileMemory& memory) {
    constexpr int ROWS = TileShape<Tile>::ROWS;
    for (int r = 0; r < ROWS; ++r) {
        const int64_t row = n + (r < count ? r : count - 1);
        convert_row(row_scales, g.scales, g.scales_dtype, row * groups, groups);
        for (int64_t j = 0; j < groups; ++j) memory.scales[j * ROWS + r] = row_scales[j];
        if (g.zeros)
            for (int64_t j = 0; j < groups; ++j)
                memory.offsets[j * ROWS + r] = -Tile::OFFSET - g.zeros[row * groups + j];
    }
}

// Rows [first, last) of x times rows [n, n + count) of w.
template <class Tile, class Rows>
void multiply_tile_rows(const LinearArgs& a, const TileShape<Tile>& shape, const Rows& weight, const TileX& x,
                        const TileMemory& memory, int64_t m0, int64_t first_panel, int64_t last_panel, int64_t n,
                        int count) {
    constexpr int ROWS = TileShape<Tile>::ROWS, W = F32::WIDTH;
    const int64_t block_bytes = shape.block * Tile::STEP / Tile::COLUMNS * Tile::BYTES;
    const int64_t first = x.panel_row(first_panel), last = x.panel_row(last_panel), bytes = weight.row_bytes();
    for (int64_t begin = 0, at = 0; begin < shape.steps; begin += shape.block, at += block_bytes) {
        const int64_t end = shape.block_end(begin);
        build_tile<Tile>(weight, n, count, at, bytes - at < block_bytes ? bytes - at : block_bytes, memory.tile);
        // The rest of these rows, or, at its end, the beginning of the next.
        TileAhead ahead{weight.row(n) + at + block_bytes, bytes, 0, ROWS * div_up(block_bytes, 64), 0};
        if (end == shape.steps) ahead.rows = weight.row(n + ROWS);
        ahead.per_run = div_up(ahead.lines, (last_panel - first_panel) * div_up(end - begin, TILE_RUN));
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const int64_t row = x.panel_row(panel);
            multiply_panel_of<Tile, Tile::X_ROWS>(static_cast<int>(x.panel_row(panel + 1) - row), shape, x, memory, row,
                                                  first, begin, end, ahead);
        }
    }
    float bias[ROWS] = {};
    if (a.bias) convert_row(bias, a.bias, a.bias_dtype, n, count);
    for (int64_t row = first; row < last; ++row)
        for (int r = 0; r < count; r += W)
            store_as(a.y, a.x_dtype, (m0 + row) * a.n + n + r,
                     load(memory.sums + (row - first) * ROWS + r) + load(bias + r), count - r < W ? count - r : W);
}

// x's rows [m0, m0 + rows), quantized and packed. `codes`, `sums` and `scales` have the sizes of TileX.
template <class Tile>
void pack_panels(const LinearArgs& a, const TileShape<Tile>& shape, int64_t group_size, int64_t x_group, int64_t m0,
                 bool zeros, int threads, const TileX& x, uint32_t* codes, int32_t* sums, float* scales) {
    const int64_t room = round_up(a.k, 128) + 64;
    parallel_for(x.panels, x.panels < 2 ? 1 : threads, [&](int64_t begin, int64_t end) {
        Carver carve(scratch(Scratch::TASK, Carver::bytes<float>(room) + Carver::bytes<int8_t>(Tile::X_ROWS * room)));
        float* row = carve.take<float>(room);
        int8_t* row_codes = carve.take<int8_t>(Tile::X_ROWS * room);
        for (int64_t k = a.k; k < room; ++k) row[k] = 0;
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t first = x.panel_row(panel), count = x.panel_row(panel + 1) - first;
            for (int64_t r = 0; r < count; ++r) {
                const int64_t i = first + r;
                int8_t* to = row_codes + r * room;
                quantize_row(a, m0 + i, x_group, row, to, scales + i * x.x_groups);
                for (int64_t k = a.k; k < room; ++k) to[k] = 0;
                for (int64_t j = 0; j < x.groups; ++j) {
                    const int64_t k0 = j * group_size, left = a.k - k0;
                    int32_t sum = 0;
                    for (int64_t k = 0; k < (left < group_size ? left : group_size); ++k) sum += to[k0 + k];
                    sums[i * x.groups + j] = zeros ? sum : -Tile::OFFSET * sum;
                }
                Tile::arrange(to, a.k);
            }
            for (int64_t begin_step = 0; begin_step < shape.steps; begin_step += shape.block) {
                const int64_t end_step = shape.block_end(begin_step);
                Tile::pack(row_codes + begin_step * Tile::STEP, room, static_cast<int>(count), end_step - begin_step,
                           codes + x.at(begin_step, end_step, first));
            }
        }
    });
}

// False if the groups are not of whole units.
template <class Rows>
bool run_tiles(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    using Tile = typename Rows::Tile;
    if (g.group_size < a.k && g.group_size % Tile::UNIT != 0) return false;
    constexpr int ROWS = TileShape<Tile>::ROWS;
    const TileShape<Tile> shape(a.k, g.group_size);
    const int64_t n_tiles = div_up(a.n, ROWS);
    for (int64_t m0 = 0; m0 < a.m; m0 += INTEGER_BLOCK_M) {
        TileX x;
        x.rows = a.m - m0 < INTEGER_BLOCK_M ? a.m - m0 : INTEGER_BLOCK_M;
        x.panels = div_up(x.rows, Tile::X_ROWS);
        x.groups = shape.groups;
        x.x_groups = div_up(a.k, x_group);
        Carver carve(scratch(Scratch::CALL, Carver::bytes<uint32_t>(x.rows * shape.steps) +
                                                Carver::bytes<int32_t>(x.rows * x.groups) +
                                                Carver::bytes<float>(x.rows * x.x_groups)));
        uint32_t* codes = carve.take<uint32_t>(x.rows * shape.steps);
        int32_t* sums = carve.take<int32_t>(x.rows * x.groups);
        float* scales = carve.take<float>(x.rows * x.x_groups);
        pack_panels<Tile>(a, shape, g.group_size, x_group, m0, g.zeros, threads, x, codes, sums, scales);
        x.codes = codes, x.sums = sums, x.scales = scales;

        // Few tiles would leave threads without work: then x is divided as well.
        const int64_t most = div_up(x.rows, TILE_TASK_ROWS), wanted = div_up(int64_t{8} * threads, n_tiles);
        const int64_t parts = threads == 1 ? 1 : wanted < most ? wanted : most;
        parallel_for(n_tiles * parts, threads, [&](int64_t begin, int64_t end) {
            const int64_t rows = div_up(x.panels, parts) * Tile::X_ROWS;
            Carver task(
                scratch(Scratch::TASK, Carver::bytes<uint8_t>(TILE_COLUMNS / Tile::STEP * TileShape<Tile>::STEP_BYTES) +
                                           2 * Carver::bytes<float>(shape.groups * ROWS) +
                                           2 * Carver::bytes<float>(rows * ROWS) + Carver::bytes<float>(shape.groups)));
            TileMemory memory;
            memory.tile = task.take<uint8_t>(TILE_COLUMNS / Tile::STEP * TileShape<Tile>::STEP_BYTES);
            memory.scales = task.take<float>(shape.groups * ROWS);
            int32_t* offsets = task.take<int32_t>(shape.groups * ROWS);
            memory.offsets = g.zeros ? offsets : nullptr;
            memory.sums = task.take<float>(rows * ROWS);
            memory.dots = task.take<int32_t>(rows * ROWS);
            float* row_scales = task.take<float>(shape.groups);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t n = i / parts * ROWS, part = i % parts;
                const int count = static_cast<int>(a.n - n < ROWS ? a.n - n : ROWS);
                if (i == begin || part == 0) gather_scales<Tile>(g, n, count, shape.groups, row_scales, memory);
                multiply_tile_rows<Tile>(a, shape, weight, x, memory, m0, x.panels * part / parts,
                                         x.panels * (part + 1) / parts, n, count);
            }
        });
    }
    return true;
}
