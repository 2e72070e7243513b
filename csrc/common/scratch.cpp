#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace llmkern {
namespace {

struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;

    ~Buffer() { std::free(data); }

    void* at_least(size_t wanted) {
        if (wanted > bytes) {
            constexpr size_t PAGE = 4096;
            std::free(data);
            bytes = 0;
            const size_t rounded = (wanted + PAGE - 1) / PAGE * PAGE;
            data = std::aligned_alloc(PAGE, rounded);
            if (data == nullptr) throw std::bad_alloc();
            bytes = rounded;
        }
        return data;
    }
};

}  // namespace

void* scratch(Scratch slot, size_t bytes) {
    thread_local Buffer buffers[3];
    return buffers[static_cast<int>(slot)].at_least(bytes);
}

}  // namespace llmkern
