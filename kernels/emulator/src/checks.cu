// Kernels with faults that the emulator is to show, for its own tests.

#include "device.cuh"
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

// out[i] = the lanes of thread i's warp whose threads have a number that 3 divides.
extern "C" __global__ void check_ballots(unsigned* out) {
    out[threadIdx.x] = __ballot_sync(ALL_LANES, threadIdx.x % 3 == 0);
}
EXPORT_KERNEL(check_ballots)

// c = a * b, with each lane's numbers taken from where the PTX manual has them. a: [16, 16], b: [16, 8], c: [16, 8]
extern "C" __global__ void check_product(const bf16* a, const bf16* b, float* c) {
    const unsigned group = threadIdx.x / 4, pair = threadIdx.x % 4 * 2;
    unsigned left[4], right[2];
    for (unsigned i = 0; i < 4; i++) {
        const bf16* at = a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
        left[i] = both(at[0], at[1]);
    }
    for (unsigned i = 0; i < 2; i++) {
        const bf16* at = b + (pair + i * 8) * 8 + group;
        right[i] = both(at[0], at[8]);
    }
    float sums[4] = {};
    mma_m16n8k16_bf16(sums, left, right);
    for (unsigned i = 0; i < 4; i++) c[(group + i / 2 * 8) * 8 + pair + i % 2] = sums[i];
}
EXPORT_KERNEL(check_product)

// The same with matrices as they come out of shared memory, and copied there. `b_columns` is b transposed.
extern "C" __global__ void check_loaded_product(const bf16* a, const bf16* b, const bf16* b_columns, float* c,
                                                float* other_c) {
    DYNAMIC_SHARED(bf16, matrices);
    bf16 *shared_a = matrices, *shared_b = shared_a + 256, *shared_columns = shared_b + 128;
    const unsigned lane = threadIdx.x;
    cp_async(shared_a + lane * 8, a + lane * 8, true);
    cp_async_commit_group();
    if (lane < 16) cp_async(shared_b + lane * 8, b + lane * 8, true);
    if (lane >= 16) cp_async(shared_columns + (lane - 16) * 8, b_columns + (lane - 16) * 8, true);
    cp_async_commit_group();
    cp_async_wait_group<1>();
    __syncthreads();
    unsigned left[4], right[4], columns[2];
    ldmatrix_x4(left, shared_a + lane % 16 * 16 + lane / 16 * 8);
    cp_async_wait_group<0>();
    __syncthreads();
    ldmatrix_x4_trans(right, shared_b + lane % 16 * 8);
    ldmatrix_x2(columns, shared_columns + lane % 8 * 16 + lane / 8 % 2 * 8);
    float sums[4] = {}, other_sums[4] = {};
    mma_m16n8k16_bf16(sums, left, {right[0], right[1]});
    mma_m16n8k16_bf16(other_sums, left, columns);
    for (unsigned i = 0; i < 4; i++) {
        const unsigned at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
        c[at] = sums[i];
        other_c[at] = other_sums[i];
    }
}
EXPORT_KERNEL(check_loaded_product)

// out[i] = in[i] where the flag is set and else 0, in pieces of 16 bytes; waits for as many groups as it is told.
extern "C" __global__ void check_copies(const unsigned* in, unsigned is_there, unsigned waits, unsigned* out) {
    DYNAMIC_SHARED(unsigned, numbers);
    cp_async(numbers + threadIdx.x * 4, in + threadIdx.x * 4, is_there != 0);
    cp_async_commit_group();
    if (waits != 0) cp_async_wait_group<0>();
    for (unsigned i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = numbers[threadIdx.x * 4 + i];
}
EXPORT_KERNEL(check_copies)

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
    mma_m16n8k32_u8_s8(c, of_a, of_b);
    for (unsigned i = 0; i < 4; i++) out[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
}
EXPORT_KERNEL(check_mma_u8_s8)

// Bytes in their order and in another one, and their signs.
extern "C" __global__ void check_permuted_bytes(unsigned* out) {
    out[0] = permute_bytes(0x83828100u, 0x07060504u, 0x3210u);
    out[1] = permute_bytes(0x83828100u, 0x07060504u, 0x4657u);
    out[2] = permute_bytes(0x83828100u, 0x07060504u, 0xba98u);
}
EXPORT_KERNEL(check_permuted_bytes)
