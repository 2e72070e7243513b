// The loops that measure a machine's limits: they run, and every level counts operations of some kind.
#include "cpu/peaks/peaks.h"

#include <initializer_list>

#include "checks.h"

void checks::check_peaks() {
    using namespace llmkern;
    const Array data(DType::F32, 1 << 18);
#define LLMKERN_PEAKS(level)                                                                               \
    if (runs_here(#level)) {                                                                               \
        double operations = 0;                                                                             \
        for (const Factors factors : {Factors::FP32, Factors::BF16, Factors::INT8})                        \
            operations += level::multiply_add(factors, 100, 2);                                            \
        check(operations > 0, "peaks on " #level ": no operations");                                       \
        for (const int64_t streams : {1, 4}) level::read(data.data(), 4 * data.count(), streams, 1024, 2); \
    }
#include "cpu/peaks/peaks.def"
#undef LLMKERN_PEAKS
}
