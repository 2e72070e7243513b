// Memory a kernel works in: per thread, aligned to 64 bytes, kept and grown between calls.
#pragma once

#include <cstddef>

namespace llmkern {

// CALL: of the calling thread, shared by the tasks; GROUPS: likewise, for index tables; TASK: of a task's thread.
enum class Scratch { CALL, GROUPS, TASK };

// At least `bytes` bytes with any content, valid until the same thread asks for the same slot again.
void* scratch(Scratch slot, size_t bytes);

inline float* scratch_floats(Scratch slot, size_t count) {
    return static_cast<float*>(scratch(slot, count * sizeof(float)));
}

}  // namespace llmkern
