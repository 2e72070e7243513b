// The way of integer.inl for several rows of x on tiles: four columns a dword. The weight is turned as in
// integer_tile.inl, but into signed codes, so that without zero points C is the centred dot product. With them the sum
// of the group's codes of x times the zero point is taken off it, both in int32: every group's dot product is exact.
// Included inside namespace llmkern::LLMKERN_NS by linear/integer.h.

// The level's Tile with build() to signed codes.
template <class Tile>
struct AmxTile;

template <>
struct AmxTile<Tile4> : Tile4 {
    static constexpr int OFFSET = 0;

    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[16], int bytes, uint8_t* to) {
        const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
        __m512i dwords[16];
        load_turned(rows, bytes, dwords);
        for (int i = 0; i < 16; ++i) {
            const __m512i low = _mm512_and_si512(dwords[i], mask);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(dwords[i], 4), mask);
            _mm512_store_si512(to + 2 * i * STEP_BYTES, _mm512_sub_epi8(low, eight));
            _mm512_store_si512(to + (2 * i + 1) * STEP_BYTES, _mm512_sub_epi8(high, eight));
        }
    }
};

template <>
struct AmxTile<Tile8> : Tile8 {
    static constexpr int OFFSET = 0;

    static LLMKERN_INLINE_MEMBER void build(const uint8_t* const (&rows)[16], int bytes, uint8_t* to) {
        __m512i dwords[16];
        load_turned(rows, bytes, dwords);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * STEP_BYTES, dwords[i]);
    }
};

struct AmxBytes {
    using Sum = int32_t;
    static constexpr int W = TileBase::VECTORS * 16;
    static constexpr bool EXACT = true;

    template <int PANELS>
    static LLMKERN_INLINE_MEMBER void multiply() {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (PANELS == 2) {
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }

    // zeros are negative.
    static LLMKERN_INLINE_MEMBER F32 value(const Sum* c, const Sum* zeros, const Sum* x_sum) {
        I32 dot = load_i32(c);
        if (zeros) dot.v = _mm512_add_epi32(dot.v, (load_i32(zeros) * set1_i32(*x_sum)).v);
        return to_float(dot);
    }
};

template <class Rows>
class AmxRows {
  public:
    using Tile = AmxTile<typename Rows::Tile>;

    AmxRows(const LinearArgs& a, const GroupArgs& g, const Rows& weight) : a_(a), g_(g), weight_(weight) {}

    void start(int64_t i, int64_t n, const AmxStrip<AmxBytes>& strip) {
        constexpr int W = AmxBytes::W;
        n_[i] = n;
        const int64_t groups = div_up(a_.k, g_.group_size);
        spread_groups<W>(strip.scales, g_.scales, g_.scales_dtype, groups, n, a_.n);
        if (!strip.zeros) return;
        for (int r = 0; r < W; ++r) {
            const int8_t* zeros = g_.zeros + (n + r < a_.n ? n + r : a_.n - 1) * groups;
            for (int64_t j = 0; j < groups; ++j) strip.zeros[j * W + r] = -zeros[j];
        }
    }

    // What the last step reads past the decoded columns meets zeros of x.
    void build(int64_t i, int64_t begin, int64_t end, const AmxStrip<AmxBytes>& strip) {
        constexpr int64_t DWORDS = Tile::COLUMNS / 4;  // of Tile::BYTES
        const int64_t at = begin / DWORDS * Tile::BYTES, most = div_up(end - begin, DWORDS) * Tile::BYTES;
        const int64_t n = n_[i], left = weight_.row_bytes() - at, bytes = left < most ? left : most;
        const int count = static_cast<int>(a_.n - n < AmxBytes::W ? a_.n - n : AmxBytes::W);
        for (int r = 0; r < AmxBytes::W; ++r)  // the next strip
            for (int64_t b = 0; b < bytes; b += 64) prefetch_far(weight_.row(n + AmxBytes::W + r) + at + b);
        build_tile<Tile>(weight_, n, count, at, bytes, reinterpret_cast<uint8_t*>(strip.tile));
    }

  private:
    const LinearArgs& a_;
    const GroupArgs& g_;
    const Rows& weight_;
    int64_t n_[AMX_STRIPS];
};

// Up to so many rows of x, sums along rows of w as stored cost less; not measured.
constexpr int64_t AMX_STREAM_ROWS = 4;

// False if there are few rows of x, which the other ways stream past, or the groups do not fit.
template <class Rows>
bool run_amx_integer(const LinearArgs& a, const GroupArgs& g, int64_t x_group, const Rows& weight, int threads) {
    using Tile = typename AmxRows<Rows>::Tile;
    const bool groups_fit =
        g.group_size >= a.k || (g.group_size % Tile::UNIT == 0 && g.group_size >= AMX_GROUP_COLUMNS);
    if (a.m <= AMX_STREAM_ROWS || !groups_fit) return false;
    const int64_t depth = round_up(a.k, Tile::UNIT) / 4, x_groups = div_up(a.k, x_group);
    const AmxShape shape(depth, g.group_size < a.k ? g.group_size / 4 : depth, CHUNK_COLUMNS / 4);
    for (int64_t m0 = 0; m0 < a.m; m0 += AMX_BLOCK_ROWS) {
        AmxX<AmxBytes> x(a.m - m0 < AMX_BLOCK_ROWS ? a.m - m0 : AMX_BLOCK_ROWS);
        const int64_t rows = x.all_rows(), tiles = rows * shape.steps() * 4 * AMX_STEP;
        Carver carve(scratch(Scratch::CALL, Carver::bytes<uint8_t>(tiles) + Carver::bytes<float>(rows * x_groups) +
                                                Carver::bytes<int32_t>(rows * shape.groups)));
        x.tiles = carve.take<uint8_t>(tiles);
        x.scales = carve.take<float>(rows * x_groups);
        if (g.zeros) x.sums = carve.take<int32_t>(rows * shape.groups);
        x.groups = shape.groups;
        x.x_groups = x_groups;
        const auto take = [&](int64_t i, const int8_t* codes, const float* scales) {
            for (int64_t j = 0; j < x_groups; ++j) x.scales[i * x_groups + j] = scales ? scales[j] : 0;
            for (int64_t j = 0; x.sums && j < x.groups; ++j) {
                int32_t sum = 0;
                for (int64_t k = j * g.group_size; codes && k < (j + 1) * g.group_size && k < a.k; ++k) sum += codes[k];
                x.sums[i * x.groups + j] = sum;
            }
            amx_pack_row(shape, x, i, reinterpret_cast<const uint16_t*>(codes), codes ? 2 * depth : 0,
                         [](uint8_t* to) { Tile::arrange(reinterpret_cast<int8_t*>(to), 64); });
        };
        quantize_rows(a, x_group, m0, x.rows, threads, take);
        for (int64_t i = x.rows; i < rows; ++i) take(i, nullptr, nullptr);
        amx_multiply(a, shape, x, m0, threads, [&] { return AmxRows<Rows>(a, g, weight); });
    }
    return true;
}
