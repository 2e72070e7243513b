// bf16 x on tiles: the weights are those of pair_tile.inl, two columns a dword. A product adds the first and the second
// factors of the 16 pairs of a step as two sums, rounding after every addition, and then both to C; it takes subnormal
// factors for 0 and flushes subnormal sums to 0. Codes are never subnormal; values of a sparse weight and x may be.
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

struct AmxFloats {
    using Sum = float;
    static constexpr int W = TILE_LANES;
    static constexpr bool EXACT = false;

    template <int PANELS>
    static LLMKERN_INLINE_MEMBER void multiply() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (PANELS == 2) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }

    static LLMKERN_INLINE_MEMBER F32 value(const Sum* c, const Sum* zeros, const Sum* x_sum) {
        return zeros ? load(c) - load(zeros) * set1(*x_sum) : load(c);
    }
};

template <class Pairs>
class AmxPairs {
  public:
    AmxPairs(const LinearArgs& a, const GroupArgs& g, const Pairs& weight) : a_(a), g_(g), weight_(weight) {}

    void start(int64_t i, int64_t n, const AmxStrip<AmxFloats>& strip) {
        const int64_t groups = (a_.k + g_.group_size - 1) / g_.group_size;
        for (int lane = 0; lane < TILE_LANES; ++lane)
            weight_.start(at_[i][lane / LANES][lane % LANES], n + lane < a_.n ? n + lane : a_.n - 1);
        if (g_.scales) {
            spread_groups<TILE_LANES>(strip.scales, g_.scales, g_.scales_dtype, groups, n, a_.n);
        } else {
            for (int lane = 0; lane < TILE_LANES; ++lane) strip.scales[lane] = 1;
        }
        if (strip.zeros) spread_groups<TILE_LANES>(strip.zeros, g_.zeros, DType::I8, groups, n, a_.n);
    }

    void build(int64_t i, int64_t begin, int64_t end, const AmxStrip<AmxFloats>& strip) {
        const int64_t columns = (2 * end < a_.k ? 2 * end : a_.k) - 2 * begin;
        for (int half = 0; half < 2; ++half) decode_pairs(weight_, at_[i][half], columns, strip.tile + half * LANES);
        // What the last step reads past the decoded columns meets zeros of x, and must be finite.
        uint32_t* rest = strip.tile + round_up(columns, Pairs::COLUMNS) / 2 * TILE_LANES;
        for (int64_t j = 0; j < (AMX_STEP - 1) * TILE_LANES; j += LANES)
            _mm512_store_si512(rest + j, _mm512_setzero_si512());
    }

  private:
    const LinearArgs& a_;
    const GroupArgs& g_;
    const Pairs& weight_;
    typename Pairs::Cursor at_[AMX_STRIPS][2][LANES];
};

// y = x @ wᵀ + bias for bf16 x.
template <class Pairs>
void run_pairs(const LinearArgs& a, const GroupArgs& g, const Pairs& weight) {
    const int threads = worth_threads(a);
    const int64_t group = g.group_size < g.k ? g.group_size / 2 : div_up(a.k, 2);
    const AmxShape shape(div_up(a.k, 2), group, CHUNK_PAIRS);
    for (int64_t m0 = 0; m0 < a.m; m0 += AMX_BLOCK_ROWS) {
        AmxX<AmxFloats> x(a.m - m0 < AMX_BLOCK_ROWS ? a.m - m0 : AMX_BLOCK_ROWS);
        const int64_t tiles = x.all_rows() * shape.steps() * 4 * AMX_STEP, sums = x.all_rows() * shape.groups;
        Carver carve(scratch(Scratch::CALL, Carver::bytes<uint8_t>(tiles) + Carver::bytes<float>(sums)));
        x.tiles = carve.take<uint8_t>(tiles);
        x.groups = shape.groups;
        if (g.zeros) x.sums = carve.take<float>(sums);
        parallel_for(x.all_rows(), threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const auto* row = static_cast<const uint16_t*>(a.x) + (m0 + i) * a.k;
                amx_pack_row(shape, x, i, row, i < x.rows ? a.k : 0, [](uint8_t*) {});
                if (!g.zeros) continue;
                if (i < x.rows)
                    sum_groups(a, g, m0 + i, x.sums + i * x.groups);
                else
                    for (int64_t j = 0; j < x.groups; ++j) x.sums[i * x.groups + j] = 0;
            }
        });
        amx_multiply(a, shape, x, m0, threads, [&] { return AmxPairs<Pairs>(a, g, weight); });
    }
}

// From how many rows of bf16 x on: those that run_linear does not stream. For 32 rows of w a step's products take 52
// cycles, the time of one result, for up to 13 rows of x, and their fp32 FMAs 32 cycles per row; but the weight is
// transposed on top of that.
constexpr int64_t AMX_PAIRS_FROM_ROWS = 9;

// Whether the arguments are for run_pairs.
LLMKERN_INLINE bool takes_pairs(const LinearArgs& a, const GroupArgs& g) {
    const bool groups_fit = g.group_size >= g.k || (g.group_size % 2 == 0 && g.group_size >= AMX_GROUP_COLUMNS);
    return a.x_dtype == DType::BF16 && a.m >= AMX_PAIRS_FROM_ROWS && a.k > 0 && groups_fit;
}
