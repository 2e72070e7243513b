// The scales and zero points of a weight's groups along K, as a Source reads them: w = (code - zero) * scale.
// Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

struct GroupArgs {
    const void* scales;  // [n, groups] in scales_dtype
    DType scales_dtype;
    const int8_t* zeros;  // [n, groups] or null
    int64_t group_size;
    int64_t k;
};

// REGULAR: groups are whole chunks, so one scale serves a chunk. Otherwise each lane looks its own scale up.
template <bool REGULAR, class Source>
class GroupScales {
    static constexpr int CHUNK = Source::VECTORS * F32::WIDTH;

  public:
    struct Cursor {
        const float* scales;       // of the row; REGULAR: from the next group on
        const int8_t* zeros;       // likewise; REGULAR only; null if there are none
        const float* zero_values;  // not REGULAR: of the row
        int64_t position;          // not REGULAR: of the next lane
    };

    static bool regular(const GroupArgs& args) { return args.group_size % CHUNK == 0 || args.group_size >= args.k; }

    explicit GroupScales(const GroupArgs& args)
        : args_(args), groups_((args.k + args.group_size - 1) / args.group_size) {
        if (!REGULAR) {
            const int64_t padded = (args.k + CHUNK - 1) / CHUNK * CHUNK;
            group_of_ = static_cast<int32_t*>(scratch(Scratch::GROUPS, padded * sizeof(int32_t)));
            for (int64_t p = 0; p < padded; ++p) {
                const int64_t column = p / CHUNK * CHUNK + Source::column(static_cast<int>(p % CHUNK));
                group_of_[p] = static_cast<int32_t>(column < args.k ? column / args.group_size : 0);
            }
        }
    }

    int64_t group_chunks() const { return REGULAR && groups_ > 1 ? args_.group_size / CHUNK : INT64_MAX; }

    int64_t buffer_floats() const { return 2 * groups_; }

    LLMKERN_INLINE_MEMBER void start(Cursor& at, int64_t row, float* buffer) const {
        at = {static_cast<const float*>(args_.scales) + row * groups_, nullptr, nullptr, 0};
        if (args_.scales_dtype != DType::F32) {
            convert_row(buffer, args_.scales, args_.scales_dtype, row * groups_, groups_);
            at.scales = buffer;
        }
        if (REGULAR) {
            if (args_.zeros) at.zeros = args_.zeros + row * groups_;
        } else {
            float* zeros = buffer + groups_;
            for (int64_t g = 0; g < groups_; ++g) zeros[g] = args_.zeros ? args_.zeros[row * groups_ + g] : 0;
            at.zero_values = zeros;
        }
    }

    // REGULAR: the scale and zero point of the group that begins.
    LLMKERN_INLINE_MEMBER void take(Cursor& at, float& scale, float& zero) const {
        scale = *at.scales++;
        zero = at.zeros ? *at.zeros++ : 0.0f;
    }

    // Not REGULAR: (code - zero) * scale of the next vector.
    LLMKERN_INLINE_MEMBER F32 look_up(Cursor& at, F32 code) const {
        const int32_t* index = group_of_ + at.position;
        at.position += F32::WIDTH;
        return (code - gather(at.zero_values, index)) * gather(at.scales, index);
    }

  private:
    GroupArgs args_;
    int64_t groups_;
    int32_t* group_of_ = nullptr;
};
