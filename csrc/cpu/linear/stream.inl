// Few rows of x (up to 8): each decoded vector is used at once for all of them; weights stream from memory
// past x, which stays in L1/L2.
//
//        k ->                       k ->
//   w  [ c0 | c1 | ...        x  [ m0 ............ ]      R rows of w by M rows of x: R * M sums in registers
//   w  [ c0 | c1 | ...           [ m1 ............ ]
//
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

// Sums start again from 0 after this many chunks per lane, because the rounding error of one long chain grows with its
// length.
constexpr int STRIP_CHUNKS = 64;

// x as fp32 rows of `ld` floats, permuted to the source's order and padded with zeros to whole chunks.
template <class Source>
void unfold_x(const LinearArgs& a, int64_t ld, int rows, float* to) {
    for (int64_t i = 0; i < rows; ++i) {
        float* row = to + i * ld;
        for (int64_t k0 = 0; k0 < ld; k0 += CHUNK<Source>) {
            float part[CHUNK<Source>] = {};
            const int64_t count = i >= a.m ? 0 : a.k - k0 < CHUNK<Source> ? a.k - k0 : CHUNK<Source>;
            convert_row(part, a.x, a.x_dtype, i * a.k + k0, count);
            for (int p = 0; p < CHUNK<Source>; ++p) row[k0 + p] = part[Source::column(p)];
        }
    }
}

// y[:, n0 .. n0 + R) for M rows of x, of which the first a.m exist.
template <int M, int R, class Source>
void stream_rows(const LinearArgs& a, const Source& source, const float* x, int64_t ld, int64_t n0, float* buffer) {
    // With few sums, one per vector of a chunk keeps more multiplications in flight.
    constexpr int CHAINS = R * M * Source::VECTORS <= REGISTERS / 4 ? Source::VECTORS : 1;
    typename Source::Cursor at[R];
    for (int r = 0; r < R; ++r) source.start(at[r], n0 + r, buffer + r * source.buffer_floats());
    F32 sums[R][M][CHAINS], totals[R][M];
    const auto multiply = [&](int64_t chunk, F32(&w)[R][Source::VECTORS]) __attribute__((always_inline)) {
        for (int v = 0; v < Source::VECTORS; ++v)
            for (int m = 0; m < M; ++m) {
                const F32 xv = load(x + m * ld + chunk * CHUNK<Source> + v * F32::WIDTH);
                for (int r = 0; r < R; ++r) sums[r][m][v % CHAINS] = fma(w[r][v], xv, sums[r][m][v % CHAINS]);
            }
    };
    const int64_t whole = a.k / CHUNK<Source>;
    for (int64_t strip = 0; strip == 0 || strip < whole; strip += STRIP_CHUNKS) {
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m)
                for (int c = 0; c < CHAINS; ++c) sums[r][m][c] = zero();
        const int64_t end = strip + STRIP_CHUNKS < whole ? strip + STRIP_CHUNKS : whole;
        walk(source, at, strip, end, multiply);
        const int columns = static_cast<int>(a.k % CHUNK<Source>);
        if (end == whole && columns) walk_last(source, at, whole, columns, multiply);
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) {
                for (int c = 1; c < CHAINS; ++c) sums[r][m][0] = sums[r][m][0] + sums[r][m][c];
                totals[r][m] = strip == 0 ? sums[r][m][0] : totals[r][m] + sums[r][m][0];
            }
    }

    for (int m = 0; m < M; ++m) {
        if (m >= a.m) break;
        for (int r = 0; r < R; ++r) {
            const float bias = a.bias ? load_one(a.bias, a.bias_dtype, n0 + r) : 0.0f;
            store_one(a.y, a.x_dtype, m * a.n + n0 + r, hsum(totals[r][m]) + bias);
        }
    }
}

template <int M, class Source>
void stream(const LinearArgs& a, const Source& source, int threads) {
    constexpr int FIT = REGISTERS / 2 / M;
    constexpr int R = FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1;
    const int64_t ld = (a.k + CHUNK<Source> - 1) / CHUNK<Source> * CHUNK<Source>;
    float* x = scratch_floats(Scratch::CALL, M * ld);
    unfold_x<Source>(a, ld, M, x);
    parallel_for((a.n + R - 1) / R, threads, [&](int64_t begin, int64_t end) {
        float* buffer = scratch_floats(Scratch::TASK, R * source.buffer_floats());
        for (int64_t n0 = begin * R; n0 < end * R; n0 += R) {
            if (n0 + R <= a.n)
                stream_rows<M, R>(a, source, x, ld, n0, buffer);
            else
                for (int64_t n = n0; n < a.n; ++n) stream_rows<M, 1>(a, source, x, ld, n, buffer);
        }
    });
}
