// The emulation's sparse products against its dense ones: a row of w with its zeros, in two products of 16 columns, and
// the same row's kept values and positions in one of 32. Fragments are laid out here from the PTX ISA's figures.
#include <cstdio>
#include <cstdlib>

#include "cuda/common/launch.h"
#include "cuda/common/wgmma_sparse.h"

using namespace llmkern::cuda;

namespace {

constexpr int NIBBLES[] = {0x4, 0x8, 0x9, 0xc, 0xd, 0xe};
float kept[64][16], dense[64][32], right[32][64];
int nibbles[64][8];
int wrong = 0;

uint32_t pair(float first, float second) { return pack2<Bf16>(first, second); }

void fill() {
    for (auto& row : dense)
        for (float& value : row) value = 0;
    for (int r = 0; r < 64; r++)
        for (int q = 0; q < 8; q++) {
            nibbles[r][q] = NIBBLES[std::rand() % 6];
            for (int h = 0; h < 2; h++) {
                kept[r][2 * q + h] = float(std::rand() % 31 - 15);
                dense[r][4 * q + (nibbles[r][q] >> 2 * h & 3)] = kept[r][2 * q + h];
            }
        }
    for (auto& row : right)
        for (float& value : row) value = float(std::rand() % 31 - 15);
}

// The left factor and its positions for rows from `first` on; lanes that the selector leaves out bring nonsense.
void left(int first, int selector, uint32_t (&a)[4], uint32_t& positions) {
    const int g = thread() % 32 / 4, c = thread() % 4;
    for (int i = 0; i < 4; i++) {
        const float* const row = kept[first + g + i % 2 * 8];
        const int column = 2 * c + i / 2 * 8;
        a[i] = pair(row[column], row[column + 1]);
    }
    positions = 0xffffffff;
    if (c / 2 == selector) {
        positions = 0;
        for (int i = 0; i < 8; i++) positions |= uint32_t(nibbles[first + g + i / 4 * 8][c % 2 * 4 + i % 4]) << 4 * i;
    }
}

float product(int row, int column) {
    float sum = 0;
    for (int k = 0; k < 32; k++) sum += dense[row][k] * right[k][column];
    return sum;
}

template <int SELECTOR>
void of_a_warp() {
    const int g = thread() / 4, c = thread() % 4;
    uint32_t a[4], b[4], positions;
    left(0, SELECTOR, a, positions);
    for (int i = 0; i < 4; i++) b[i] = pair(right[2 * c + 8 * i][g], right[2 * c + 8 * i + 1][g]);
    float sparse[4] = {}, twice[4] = {};
    mma_sparse<Bf16, SELECTOR>(sparse, a, b, positions);
    for (int half = 0; half < 2; half++) {
        uint32_t whole[4];
        for (int i = 0; i < 4; i++) {
            const float* const at = dense[g + i % 2 * 8] + 16 * half + 2 * c + i / 2 * 8;
            whole[i] = pair(at[0], at[1]);
        }
        mma<Bf16>(twice, whole, b[2 * half], b[2 * half + 1]);
    }
    for (int i = 0; i < 4; i++) {
        const float wanted = product(g + i / 2 * 8, 2 * c + i % 2);
        if (sparse[i] != wanted || twice[i] != wanted) wrong++;
    }
}

template <int SELECTOR>
void of_a_warpgroup() {
    uint32_t a[4], positions;
    left(thread() / 32 * 16, SELECTOR, a, positions);
    for (int at = thread(); at < 64 * 32; at += 128) {
        const int token = at / 32, k = at % 32;
        uint8_t* const to = shared_memory() + swizzled(token, k / 8) + k % 8 * 2;
        *reinterpret_cast<uint16_t*>(to) = uint16_t(pair(right[k][token], 0));
    }
    float d[8][4] = {};
    fence_async();
    sync_block();
    wgmma_fence();
    wgmma_sparse<Bf16, 64, SELECTOR>(d, a, positions, describe(shared_memory(), 0));
    wgmma_commit();
    wgmma_wait<0>();
    for (int t = 0; t < 8; t++)
        for (int i = 0; i < 4; i++)
            if (d[t][i] !=
                product(thread() / 32 * 16 + thread() % 32 / 4 + i / 2 * 8, 8 * t + thread() % 4 * 2 + i % 2))
                wrong++;
}

void run(void (*kernel)(), unsigned threads) {
    Grid grid;
    grid.threads = threads;
    grid.shared_bytes = 8192;
    launch("", kernel, grid, nullptr);
}

}  // namespace

int main() {
    for (int i = 0; i < 20; i++) {
        fill();
        run(of_a_warp<0>, 32);
        run(of_a_warp<1>, 32);
        run(of_a_warpgroup<0>, 128);
        run(of_a_warpgroup<1>, 128);
    }
    if (wrong) std::printf("%d sums differ\n", wrong);
    return wrong != 0;
}
