// Kernels with faults that the emulator is to show, for its own tests.

#include "mma.cuh"

// out[i] = 1 + the number of the block's thread before, around.
extern "C" __global__ void check_neighbours(unsigned* out) {
    SHARED(unsigned, numbers, 64);
    numbers[threadIdx.x] = threadIdx.x + 1;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = numbers[(threadIdx.x + blockDim.x - 1) % blockDim.x];
}
EXPORT_KERNEL(check_neighbours)

// The same without the barrier.
extern "C" __global__ void check_missed_barrier(unsigned* out) {
    SHARED(unsigned, numbers, 64);
    numbers[threadIdx.x] = threadIdx.x + 1;
    out[blockIdx.x * blockDim.x + threadIdx.x] = numbers[(threadIdx.x + blockDim.x - 1) % blockDim.x];
}
EXPORT_KERNEL(check_missed_barrier)

extern "C" __global__ void check_half_a_barrier(unsigned* out) {
    if (threadIdx.x % 2 == 0) __syncthreads();
    out[threadIdx.x] = 0;
}
EXPORT_KERNEL(check_half_a_barrier)

// Each warp tells all others its number, and then ten times it, in the same place: without a barrier after the first
// look.
extern "C" __global__ void check_reused_memory(unsigned* out) {
    SHARED(unsigned, numbers, 2);
    unsigned sum = 0;
    for (unsigned round = 0; round < 2; round++) {
        if (threadIdx.x % WARP_SIZE == 0) numbers[threadIdx.x / WARP_SIZE] = (threadIdx.x / WARP_SIZE + 1) * (round == 0 ? 1 : 10);
        __syncthreads();
        sum += numbers[0] + numbers[1];
    }
    out[threadIdx.x] = sum;
}
EXPORT_KERNEL(check_reused_memory)

extern "C" __global__ void check_overrun(unsigned* out) {
    DYNAMIC_SHARED(unsigned, numbers);
    numbers[threadIdx.x + 1] = 0;
    out[threadIdx.x] = 0;
}
EXPORT_KERNEL(check_overrun)

// out[i] = the sum of the numbers of the lanes of thread i's warp, by way of dynamic memory.
extern "C" __global__ void check_warp_sums(unsigned* out) {
    DYNAMIC_SHARED(unsigned, numbers);
    unsigned sum = threadIdx.x;
    for (int lanes = WARP_SIZE / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    numbers[threadIdx.x] = sum;
    __syncthreads();
    out[threadIdx.x] = numbers[threadIdx.x];
}
EXPORT_KERNEL(check_warp_sums)

// out = a * b of 16 rows of 32 unsigned bytes and 8 columns of as many signed ones. Elements by their numbers within a
// lane's registers, as the manual of the instruction lists them.
extern "C" __global__ void check_mma_u8_s8(const unsigned char* a, const signed char* b, int* out) {
    const unsigned group = threadIdx.x / 4, in_group = threadIdx.x % 4;
    unsigned of_a[4] = {0, 0, 0, 0}, of_b[2] = {0, 0};
    for (unsigned i = 0; i < 16; i++) {
        const unsigned row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
        const unsigned col = i < 8 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16;
        of_a[i / 4] |= static_cast<unsigned>(a[row * 32 + col]) << (i % 4 * 8);
    }
    for (unsigned i = 0; i < 8; i++) {
        const unsigned row = i < 4 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16;
        of_b[i / 4] |= static_cast<unsigned>(static_cast<unsigned char>(b[group * 32 + row])) << (i % 4 * 8);
    }
    // What is there already is kept.
    int c[4] = {1, 1, 1, 1};
    mma_u8_s8(c, of_a, of_b);
    for (unsigned i = 0; i < 4; i++) out[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
}
EXPORT_KERNEL(check_mma_u8_s8)

// The same of 16 numbers in bf16, in f32.
extern "C" __global__ void check_mma_bf16(const unsigned short* a, const unsigned short* b, float* out) {
    const unsigned group = threadIdx.x / 4, in_group = threadIdx.x % 4;
    unsigned of_a[4] = {0, 0, 0, 0}, of_b[2] = {0, 0};
    for (unsigned i = 0; i < 8; i++) {
        const unsigned row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const unsigned col = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        of_a[i / 2] |= static_cast<unsigned>(a[row * 16 + col]) << (i % 2 * 16);
    }
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        of_b[i / 2] |= static_cast<unsigned>(b[group * 16 + row]) << (i % 2 * 16);
    }
    float c[4] = {1, 1, 1, 1};
    mma_bf16(c, of_a, of_b);
    for (unsigned i = 0; i < 4; i++) out[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
}
EXPORT_KERNEL(check_mma_bf16)

// Bytes in their order and in another one, their signs; lanes of which something is true.
extern "C" __global__ void check_permuted_bytes(unsigned* out) {
    out[0] = permute_bytes(0x83828100u, 0x07060504u, 0x3210u);
    out[1] = permute_bytes(0x83828100u, 0x07060504u, 0x4657u);
    out[2] = permute_bytes(0x83828100u, 0x07060504u, 0xba98u);
    out[3] = __ballot_sync(ALL_LANES, threadIdx.x % 3 == 0);
}
EXPORT_KERNEL(check_permuted_bytes)

// Two tiles of 32 numbers, one copied while the other is read; a fault leaves out the wait, or the barrier before a
// tile is written again.
template <int FAULT>
static __device__ void copied(const uint4* numbers, unsigned* out, unsigned num_tiles) {
    SHARED(uint4, tiles, 16);
    const auto start = [&](unsigned tile) {
        const unsigned at = threadIdx.x;
        if (at < 8) copy_async<16>(&tiles[tile % 2 * 8 + at], numbers + tile * 8 + at, tile < num_tiles);
        commit_copies();
    };
    start(0);
    for (unsigned tile = 0; tile < num_tiles; tile++) {
        start(tile + 1);
        if (FAULT != 1) wait_for_copies<1>();
        __syncthreads();
        const uint4 from = tiles[tile % 2 * 8 + (threadIdx.x + 5) % 8];
        out[tile * blockDim.x + threadIdx.x] = from.x + from.y + from.z + from.w;
        if (FAULT != 2) __syncthreads();
    }
}

extern "C" __global__ void check_copies(const uint4* numbers, unsigned* out, unsigned num_tiles) {
    copied<0>(numbers, out, num_tiles);
}
EXPORT_KERNEL(check_copies)

extern "C" __global__ void check_missed_wait(const uint4* numbers, unsigned* out, unsigned num_tiles) {
    copied<1>(numbers, out, num_tiles);
}
EXPORT_KERNEL(check_missed_wait)

extern "C" __global__ void check_reused_tile(const uint4* numbers, unsigned* out, unsigned num_tiles) {
    copied<2>(numbers, out, num_tiles);
}
EXPORT_KERNEL(check_reused_tile)
