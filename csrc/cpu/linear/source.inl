// Linear layers with activations kept: x in fp32, weights decoded to fp32 on the way, fp32 sums.
//
// A weight format gives a Source, which decodes one row from left to right in chunks of CHUNK columns:
//
//   struct Source {
//       static constexpr int VECTORS;            // vectors per chunk; CHUNK = VECTORS * F32::WIDTH
//       static constexpr int column(int p);      // the column, within a chunk, that lane p of a decoded chunk holds
//       struct Cursor;                           // where in a row we are
//       int64_t group_chunks() const;            // chunks per scale group (any large number if there are no groups)
//       int64_t buffer_floats() const;           // floats of scratch that a cursor needs
//       void start(Cursor&, int64_t row, float* buffer) const;
//       void group(Cursor&) const;               // called before the first chunk of every group
//       void next(Cursor&, F32 (&w)[VECTORS]) const;               // decode a whole chunk and move on
//       void last(Cursor&, F32 (&w)[VECTORS], int columns) const;  // the short chunk that ends a row: reads nothing
//   };                                                             // past the row; lanes past it: any finite value
//
// Decoded weights include their scale. `column` lets a format yield its natural order (int4: even columns, then odd
// ones): x is permuted to it once per call, instead of every weight. A Source is used by several threads at once.
//
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

// How far ahead of its reading a source should prefetch its weights, in bytes. Several rows are read at once, so the
// distance must pass all of them; 16 KiB measured twice as fast as 1 KiB for 4 rows of 4 KiB.
constexpr int64_t PREFETCH_AHEAD = 16384;

constexpr int REGISTERS = vector_registers(F32::WIDTH);

template <class Source>
constexpr int CHUNK = Source::VECTORS * F32::WIDTH;

// Calls use(chunk, w) with the decoded weights w[R][VECTORS] of chunks [begin, end) of R rows.
template <int R, class Source, class Use>
LLMKERN_INLINE void walk(const Source& source, typename Source::Cursor (&at)[R], int64_t begin, int64_t end, Use use) {
    const int64_t per_group = source.group_chunks();
    int64_t left = begin == 0 ? per_group : per_group - begin % per_group;  // chunks of the group
    for (int64_t chunk = begin; chunk < end; left = per_group) {
        if (left == per_group)
            for (int r = 0; r < R; ++r) source.group(at[r]);
        for (const int64_t stop = left < end - chunk ? chunk + left : end; chunk < stop; ++chunk) {
            F32 w[R][Source::VECTORS];
            for (int r = 0; r < R; ++r) source.next(at[r], w[r]);
            use(chunk, w);
        }
    }
}

// The same for the short chunk after `chunk` whole ones.
template <int R, class Source, class Use>
LLMKERN_INLINE void walk_last(const Source& source, typename Source::Cursor (&at)[R], int64_t chunk, int columns,
                              Use use) {
    if (chunk % source.group_chunks() == 0)
        for (int r = 0; r < R; ++r) source.group(at[r]);
    F32 w[R][Source::VECTORS];
    for (int r = 0; r < R; ++r) source.last(at[r], w[r], columns);
    use(chunk, w);
}
