// Square blocks of a row-major matrix to and from tiles whose lanes are rows.

// One exchange of a butterfly: rows a and b swap their off-diagonal blocks of H lanes.
template <int H, size_t... I>
LLMKERN_INLINE void exchange(F32& a, F32& b, std::index_sequence<I...>) {
    constexpr int W = F32::WIDTH;
    const auto x = a.v, y = b.v;
#if defined(__clang__)
    a.v = __builtin_shufflevector(x, y, (I & H ? int(I) - H + W : int(I))...);
    b.v = __builtin_shufflevector(x, y, (I & H ? int(I) + W : int(I) + H)...);
#else
    typedef int32_t Index __attribute__((vector_size(4 * W)));
    a.v = __builtin_shuffle(x, y, Index{(I & H ? int(I) - H + W : int(I))...});
    b.v = __builtin_shuffle(x, y, Index{(I & H ? int(I) + W : int(I) + H)...});
#endif
}

template <int H>
LLMKERN_INLINE void exchange_rows(F32 (&rows)[F32::WIDTH]) {
    if constexpr (H < F32::WIDTH) {
        for (int i = 0; i < F32::WIDTH; ++i)
            if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_index_sequence<F32::WIDTH>());
        exchange_rows<2 * H>(rows);
    }
}

LLMKERN_INLINE void transpose(F32 (&rows)[F32::WIDTH]) { exchange_rows<1>(rows); }
