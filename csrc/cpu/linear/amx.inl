// Many rows of x on machines that multiply tiles of registers (AMX): what bf16 (amx_pairs.inl) and int8
// (amx_integer.inl) share. A dword is two bf16 or four int8 along K, a step is 16 dwords:
//
//        a step of K                            16 rows of w
//   A  [ m0 | d0 d1 ... d15 ]             B  [ d0  | n0 n1 ... n15 ]          C[m][n] += dot(A[m], B[.][n])
//      [ m1 | d0 d1 ... d15 ]                [ d1  | n0 n1 ... n15 ]
//        up to 16 rows of x                    ... 16 dwords of K
//
// Two A by two B by four C fill the eight registers: 32 rows of x times 32 rows of w, four products for four loads. A
// product takes as many cycles as A has rows, 16 at most, and its result is there after 52.
//
// K is walked in chunks of CHUNK_COLUMNS. Of a chunk, the weight's rows, a strip of W at a time, become B once, 32 KiB;
// then they are multiplied with all rows of x, whose A tiles were packed at the beginning of the call. Where a group of
// columns ends, C leaves the registers and is scaled into fp32 sums. A group that is no multiple of a step is filled
// up: A has zeros there, and B whatever comes next, so that nothing is added.
//
//   time at least: N K M / (16 * 32) cycles a core for bf16, half of that for int8, or the bytes of the weight
//
// Kind is AmxFloats or AmxBytes:
//
//   struct Kind {
//       typedef Sum;                             // of a tile C: float or int32_t
//       static constexpr int W;                  // rows of w in a strip
//       static constexpr bool EXACT;             // C goes on where a chunk ends within a group; and x has scales
//       static void multiply<PANELS>();          // C += A B; tiles 0 1 2 3 = 4 4 5 5 times 6 7 6 7
//       static F32 value(const Sum* c, const Sum* zeros, const Sum* x_sum);     // C without what zero points add
//   };
//
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

constexpr int AMX_ROWS = 16;
constexpr int AMX_STEP = 16;  // dwords
// Groups whose C wait in L1 to be scaled together: a sum is then read and written once for all of them.
constexpr int AMX_WAITING = 4;
// x of a chunk, and the sums of a panel of strips, should stay in L2: 512 KiB each.
constexpr int64_t AMX_BLOCK_ROWS = 512;
// Rows of w for which x of a chunk, once in L2, is used.
constexpr int64_t AMX_ROWS_TOGETHER = 256;
constexpr int AMX_STRIPS = AMX_ROWS_TOGETHER / 32;
// Fewer rows of x than this in a task would spend too much of its time on building B.
constexpr int64_t AMX_TASK_ROWS = 96;
// Columns of the smallest group: for fewer, taking C out of the registers costs more than the products save.
constexpr int64_t AMX_GROUP_COLUMNS = 16;

// What the compiler has to take as read and written: GCC 12 says of ldtilecfg and of tile loads only that they take an
// address, and would drop or delay the stores to what they read.
LLMKERN_INLINE void settle(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// The configuration of this thread's tiles: A and C of `rows` rows, B of 16. A thread of the program gets back what it
// had, because other libraries remember that they have configured it.
class AmxRegisters {
  public:
    explicit AmxRegisters(int64_t rows) {
        settle(&before_);
        _tile_storeconfig(&before_);
        settle(&before_);
        Config config{};
        config.palette = 1;
        for (int i = 0; i < 8; ++i) {
            config.row_bytes[i] = 4 * AMX_STEP;
            config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : AMX_STEP);
        }
        settle(&config);
        _tile_loadconfig(&config);
    }
    ~AmxRegisters() {
        if (before_.palette)
            _tile_loadconfig(&before_);
        else
            _tile_release();
    }
    AmxRegisters(const AmxRegisters&) = delete;
    AmxRegisters& operator=(const AmxRegisters&) = delete;

  private:
    struct alignas(64) Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    Config before_{};
};

// Dwords [first, first + dwords) of a chunk, which belong to one group.
struct AmxSegment {
    int64_t group, first, dwords;
    bool begins, ends;  // the group, not only this chunk's part of it

    LLMKERN_INLINE_MEMBER int64_t steps() const { return div_up(dwords, AMX_STEP); }
};

struct AmxShape {
    int64_t depth;  // dwords of a row
    int64_t group;  // of a group
    int64_t groups;
    int64_t chunk;  // of a chunk

    AmxShape(int64_t depth, int64_t group, int64_t chunk)
        : depth(depth), group(group < depth ? group : depth), groups(div_up(depth, this->group)), chunk(chunk) {}

    int64_t chunk_end(int64_t begin) const { return begin + chunk < depth ? begin + chunk : depth; }

    template <class Use>
    LLMKERN_INLINE_MEMBER void for_segments(int64_t begin, int64_t end, Use use) const {
        for (int64_t at = begin; at < end;) {
            const int64_t index = at / group, group_begin = index * group;
            const int64_t group_end = group_begin + group < depth ? group_begin + group : depth;
            const int64_t stop = group_end < end ? group_end : end;
            use(AmxSegment{index, at - begin, stop - at, at == group_begin, stop == group_end});
            at = stop;
        }
    }

    int64_t steps(int64_t begin, int64_t end) const {
        int64_t steps = 0;
        for_segments(begin, end, [&](const AmxSegment& s) { steps += s.steps(); });
        return steps;
    }

    int64_t steps() const {
        int64_t all = 0;
        for (int64_t begin = 0; begin < depth; begin += chunk) all += steps(begin, chunk_end(begin));
        return all;
    }
};

// Rows of x as A tiles. Rows are divided evenly, and into an even number of panels if there are several: a panel alone
// has two sums at a time, and each product waits for the one before.
template <class Kind>
struct AmxX {
    int64_t rows, panels, panel_rows;
    uint8_t* tiles = nullptr;            // [chunk][panel][step][row of the panel][64]
    typename Kind::Sum* sums = nullptr;  // [row][groups] of x; null if there are no zero points
    float* scales = nullptr;             // [row][x_groups]; null if there are none
    int64_t groups = 0, x_groups = 0;

    explicit AmxX(int64_t rows)
        : rows(rows), panels(rows <= AMX_ROWS ? 1 : 2 * div_up(rows, 2 * AMX_ROWS)), panel_rows(div_up(rows, panels)) {}

    int64_t all_rows() const { return panels * panel_rows; }  // those past `rows` are 0
    int64_t tile_bytes() const { return panel_rows * 4 * AMX_STEP; }
};

// Packs row i of x, of which `words` 16-bit words exist; fix(to) may reorder the 64 bytes of a step.
template <class Kind, class Fix>
void amx_pack_row(const AmxShape& shape, const AmxX<Kind>& x, int64_t i, const uint16_t* row, int64_t words, Fix fix) {
    const int64_t panel = i / x.panel_rows, tile_bytes = x.tile_bytes();
    uint8_t* chunk = x.tiles + i % x.panel_rows * 4 * AMX_STEP;
    for (int64_t begin = 0; begin < shape.depth; begin += shape.chunk) {
        const int64_t end = shape.chunk_end(begin), steps = shape.steps(begin, end);
        uint8_t* to = chunk + panel * steps * tile_bytes;
        chunk += x.panels * steps * tile_bytes;
        shape.for_segments(begin, end, [&](const AmxSegment& s) {
            for (int64_t d = 0; d < s.dwords; d += AMX_STEP) {
                const int64_t at = 2 * (begin + s.first + d), in_group = 2 * (s.dwords - d), in_row = words - at;
                const int64_t count = in_group < in_row ? in_group : in_row;
                _mm512_store_si512(
                    to, count > 0 ? _mm512_maskz_loadu_epi16(words_mask(count), row + at) : _mm512_setzero_si512());
                fix(to);
                to += tile_bytes;
            }
        });
    }
}

// A strip: W rows of w.
template <class Kind>
struct AmxStrip {
    uint32_t* tile;             // [dword of the chunk][W], and 15 dwords more, which may be anything finite
    float* scales;              // [group][W]
    typename Kind::Sum* zeros;  // likewise; null if there are none
    float* sums;                // [row of x][W]
    int32_t* dots;              // likewise, of a group that began in an earlier chunk; null unless EXACT
};

// The memory of a task.
template <class Kind>
struct AmxMemory {
    using Sum = typename Kind::Sum;
    static constexpr int64_t C = 4 * AMX_ROWS * 16;  // sums in four tiles

    int64_t tile_dwords, groups, rows;
    bool zeros;

    int64_t strip_bytes() const {
        return Carver::bytes<uint32_t>(tile_dwords * Kind::W) + 2 * Carver::bytes<float>(groups * Kind::W) +
               2 * Carver::bytes<float>(rows * Kind::W);
    }
    static int64_t waiting_bytes() { return Carver::bytes<Sum>(AMX_WAITING * C); }

    AmxStrip<Kind> strip(Carver& carve) const {
        AmxStrip<Kind> strip;
        strip.tile = carve.take<uint32_t>(tile_dwords * Kind::W);
        strip.scales = carve.take<float>(groups * Kind::W);
        Sum* values = carve.take<Sum>(groups * Kind::W);
        strip.zeros = zeros ? values : nullptr;
        strip.sums = carve.take<float>(rows * Kind::W);
        strip.dots = carve.take<int32_t>(rows * Kind::W);
        return strip;
    }
};

// Groups whose C wait, [group][panel][half][row][16], to be scaled together.
template <class Kind>
struct AmxWaiting {
    typename Kind::Sum* c;
    int64_t groups[AMX_WAITING];
    bool ends[AMX_WAITING];
    int count = 0;
};

// Scales them into the sums of PANELS panels from row `row` of x, which is row `to_row` of the sums, and of 32 rows of
// w from `lane`.
template <class Kind, int PANELS, bool ZEROS>
void amx_scale(const AmxX<Kind>& x, const AmxStrip<Kind>& w, const AmxWaiting<Kind>& waiting, int64_t row,
               int64_t to_row, int64_t lane) {
    settle(waiting.c);
    for (int panel = 0; panel < PANELS; ++panel)
        for (int64_t r = 0; r < x.panel_rows; ++r, ++row, ++to_row)
            for (int half = 0; half < 2; ++half) {
                const int64_t n = lane + half * 16;
                const auto* c = waiting.c + ((2 * panel + half) * AMX_ROWS + r) * 16;
                float* sum = w.sums + to_row * Kind::W + n;
                F32 total = load(sum);
                for (int i = 0; i < waiting.count; ++i, c += AmxMemory<Kind>::C) {
                    const int64_t group = waiting.groups[i], at = group * Kind::W + n;
                    const bool shift = ZEROS && waiting.ends[i];
                    const F32 value = Kind::value(c, shift ? w.zeros + at : nullptr,
                                                  shift ? x.sums + row * x.groups + group : nullptr);
                    F32 scale = load(w.scales + at);
                    if (Kind::EXACT) scale = scale * set1(x.scales[row * x.x_groups + (x.x_groups > 1 ? group : 0)]);
                    total = fma(value, scale, total);
                }
                store(sum, total);
            }
}

template <class Kind, int PANELS>
LLMKERN_INLINE void amx_zero() {
    _tile_zero(0);
    _tile_zero(1);
    if (PANELS == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

template <int PANELS, class T>
LLMKERN_INLINE void amx_load(const T* from, int64_t ld, int64_t panel, int64_t half) {
    const int64_t stride = ld * static_cast<int64_t>(sizeof(T));
    settle(from);
    _tile_loadd(0, from, stride);
    _tile_loadd(1, from + half, stride);
    if (PANELS == 2) {
        _tile_loadd(2, from + panel, stride);
        _tile_loadd(3, from + panel + half, stride);
    }
}

template <int PANELS, class T>
LLMKERN_INLINE void amx_store(T* to, int64_t ld, int64_t panel, int64_t half) {
    const int64_t stride = ld * static_cast<int64_t>(sizeof(T));
    _tile_stored(0, to, stride);
    _tile_stored(1, to + half, stride);
    if (PANELS == 2) {
        _tile_stored(2, to + panel, stride);
        _tile_stored(3, to + panel + half, stride);
    }
}

// C += the next `steps` steps of A times those of B.
template <class Kind, int PANELS>
LLMKERN_INLINE void amx_steps(const uint8_t* a, int64_t a_panel, int64_t a_step, const uint32_t* b, int64_t steps) {
    settle(b);
    for (; steps > 0; --steps) {
        _tile_loadd(4, a, 4 * AMX_STEP);
        _tile_loadd(6, b, 4 * Kind::W);
        _tile_loadd(7, b + 16, 4 * Kind::W);
        if (PANELS == 2) _tile_loadd(5, a + a_panel, 4 * AMX_STEP);
        Kind::template multiply<PANELS>();
        a += a_step;
        b += AMX_STEP * Kind::W;
    }
}

// A chunk of PANELS panels times 32 rows of w from `lane`; the A tiles of the first panel begin at `a`.
template <class Kind, int PANELS>
void amx_multiply_block(const AmxShape& shape, const AmxX<Kind>& x, const AmxStrip<Kind>& w, int64_t begin, int64_t end,
                        const uint8_t* a, int64_t a_panel, int64_t row, int64_t to_row, int64_t lane,
                        typename Kind::Sum* memory) {
    AmxWaiting<Kind> waiting;
    waiting.c = memory;
    const auto scale = [&] {
        if (w.zeros)
            amx_scale<Kind, PANELS, true>(x, w, waiting, row, to_row, lane);
        else
            amx_scale<Kind, PANELS, false>(x, w, waiting, row, to_row, lane);
        waiting.count = 0;
    };
    int32_t* dots = w.dots + to_row * Kind::W + lane;
    const int64_t dots_panel = x.panel_rows * Kind::W;
    shape.for_segments(begin, end, [&](const AmxSegment& s) __attribute__((always_inline)) {
        if (s.begins || !Kind::EXACT)
            amx_zero<Kind, PANELS>();
        else
            amx_load<PANELS>(dots, Kind::W, dots_panel, 16);
        amx_steps<Kind, PANELS>(a, a_panel, x.tile_bytes(), w.tile + s.first * Kind::W + lane, s.steps());
        a += s.steps() * x.tile_bytes();
        if (!s.ends && Kind::EXACT) {
            amx_store<PANELS>(dots, Kind::W, dots_panel, 16);
            return;
        }
        amx_store<PANELS>(waiting.c + waiting.count * AmxMemory<Kind>::C, 16, 2 * AMX_ROWS * 16, AMX_ROWS * 16);
        waiting.groups[waiting.count] = s.group;
        waiting.ends[waiting.count++] = s.ends;
        if (waiting.count == AMX_WAITING) scale();
    });
    if (waiting.count) scale();
}

// Strips that a task takes together. If all A tiles fit half of L2 they are read from there strip by strip, and the
// weights come at an even pace. Otherwise x comes from further away, once for AMX_ROWS_TOGETHER rows of w.
inline int64_t amx_strips_together(int64_t x_bytes, int64_t strip_rows, int64_t strips, int threads) {
    constexpr int64_t L2_HALF = 1 << 20;
    const int64_t most = x_bytes <= L2_HALF ? 1 : AMX_ROWS_TOGETHER / strip_rows;
    const int64_t each = div_up(strips, int64_t{4} * threads);
    return each < most ? each : most;
}

// Rows [first, last) of x, as they are in the sums of a strip, to y.
template <class Kind>
void amx_write(const LinearArgs& a, const AmxStrip<Kind>& w, int64_t m0, int64_t first, int64_t last, int64_t n) {
    constexpr int WIDTH = F32::WIDTH;
    const int64_t count = a.n - n < Kind::W ? a.n - n : Kind::W;
    float bias[Kind::W] = {};
    if (a.bias) convert_row(bias, a.bias, a.bias_dtype, n, count);
    for (int64_t row = first; row < last; ++row)
        for (int64_t i = 0; i < count; i += WIDTH)
            store_as(a.y, a.x_dtype, (m0 + row) * a.n + n + i,
                     load(w.sums + (row - first) * Kind::W + i) + load(bias + i),
                     static_cast<int>(count - i < WIDTH ? count - i : WIDTH));
}

// Pairs of panels [first, last) times `count` strips from row n of w on.
template <class Kind, class Weight>
void amx_multiply_strips(const LinearArgs& a, const AmxShape& shape, const AmxX<Kind>& x, int64_t m0, Weight& weight,
                         const AmxStrip<Kind>* strip, int64_t count, int64_t n, int64_t first, int64_t last,
                         typename Kind::Sum* waiting) {
    const int64_t first_row = first * 2 * x.panel_rows;
    for (int64_t i = 0; i < count; ++i) {
        weight.start(i, n + i * Kind::W, strip[i]);
        const int64_t sums = ((last - first) * 2 * x.panel_rows) * Kind::W;
        for (int64_t j = 0; j < sums; j += F32::WIDTH) store(strip[i].sums + j, zero());
    }
    const uint8_t* chunk = x.tiles;
    for (int64_t begin = 0; begin < shape.depth; begin += shape.chunk) {
        const int64_t end = shape.chunk_end(begin), a_panel = shape.steps(begin, end) * x.tile_bytes();
        for (int64_t i = 0; i < count; ++i) {
            weight.build(i, begin, end, strip[i]);
            for (int64_t pair = first; pair < last; ++pair) {
                const int64_t row = pair * 2 * x.panel_rows;
                const uint8_t* tiles = chunk + 2 * pair * a_panel;
                const auto multiply =
                    2 * pair + 1 < x.panels ? amx_multiply_block<Kind, 2> : amx_multiply_block<Kind, 1>;
                for (int lane = 0; lane < Kind::W; lane += 32)
                    multiply(shape, x, strip[i], begin, end, tiles, a_panel, row, row - first_row, lane, waiting);
            }
        }
        chunk += x.panels * a_panel;
    }
    const int64_t last_row = last * 2 * x.panel_rows < x.rows ? last * 2 * x.panel_rows : x.rows;
    for (int64_t i = 0; i < count; ++i) amx_write(a, strip[i], m0, first_row, last_row, n + i * Kind::W);
}

// y[m0 .. m0 + x.rows, :]. make() gives the Weight of a task, which knows its strips by their number: start(i, n,
// strip) takes rows n .. n + W of w, with their scales and zero points, and build(i, begin, end, strip) the tile of
// dwords [begin, end) of them, in order.
template <class Kind, class Make>
void amx_multiply(const LinearArgs& a, const AmxShape& shape, const AmxX<Kind>& x, int64_t m0, int threads, Make make) {
    const int64_t strips = div_up(a.n, Kind::W), pairs = div_up(x.panels, 2);
    const int64_t together = amx_strips_together(x.all_rows() * shape.steps() * 4 * AMX_STEP, Kind::W, strips, threads);
    // Few strips would leave threads without work: then x is divided as well.
    const int64_t groups = div_up(strips, together), most = div_up(x.rows, AMX_TASK_ROWS);
    const int64_t wanted = div_up(int64_t{4} * threads, groups);
    const int64_t parts = threads == 1 ? 1 : wanted < most ? wanted : most;
    const AmxMemory<Kind> memory{shape.chunk + AMX_STEP, shape.groups, div_up(pairs, parts) * 2 * x.panel_rows,
                                 x.sums != nullptr};
    parallel_for(groups * parts, threads, [&](int64_t first_task, int64_t last_task) {
        Carver carve(scratch(Scratch::TASK, together * memory.strip_bytes() + AmxMemory<Kind>::waiting_bytes()));
        AmxStrip<Kind> strip[AMX_STRIPS];
        for (int64_t i = 0; i < together; ++i) strip[i] = memory.strip(carve);
        auto* waiting = carve.take<typename Kind::Sum>(AMX_WAITING * AmxMemory<Kind>::C);
        auto weight = make();
        const AmxRegisters registers(x.panel_rows);
        for (int64_t task = first_task; task < last_task; ++task) {
            const int64_t first = task / parts * together, part = task % parts;
            amx_multiply_strips(a, shape, x, m0, weight, strip, strips - first < together ? strips - first : together,
                                first * Kind::W, pairs * part / parts, pairs * (part + 1) / parts, waiting);
        }
    });
}
