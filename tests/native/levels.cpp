// The native kernels of every level that this machine has, without Python: `levels` prints the levels and checks all of
// them, `levels NAME ...` demands that exactly these are here.
#include "common/cpu_level.h"

#include "checks.h"

bool checks::runs_here(const char* name) {
    for (const llmkern::Level& level : llmkern::levels())
        if (std::strcmp(level.name, name) == 0) return level.available;
    return false;
}

int main(int count, char** wanted) {
    for (const llmkern::Level& level : llmkern::levels()) {
        std::printf("%s: %s %s\n", level.name, level.available ? "here" : "this machine lacks", level.flags);
        bool named = count == 1 && level.available;
        for (int i = 1; i < count; ++i) named = named || std::strcmp(wanted[i], level.name) == 0;
        checks::check(named == level.available, "level %s is %shere", level.name, level.available ? "" : "not ");
    }
    checks::check_linear_ops();
    checks::check_solver_ops();
    checks::check_losses();
    checks::check_peaks();
    std::printf("%lld checks, %lld failed\n", static_cast<long long>(checks::done),
                static_cast<long long>(checks::failed));
    return checks::failed ? 1 : 0;
}
