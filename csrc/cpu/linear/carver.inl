// Rounding up, and scratch memory in pieces. Included inside namespace llmkern::LLMKERN_NS by linear/driver.h.

LLMKERN_INLINE int64_t div_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

LLMKERN_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A piece of scratch memory at a time, each aligned to 64 bytes.
class Carver {
  public:
    explicit Carver(void* memory) : at_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(at_);
        at_ += bytes<T>(count);
        return piece;
    }

    template <class T>
    static int64_t bytes(int64_t count) {
        return round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    }

  private:
    char* at_;
};
