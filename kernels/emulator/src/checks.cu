// Kernels with faults that the emulator is to show, for its own tests.

#include "device.cuh"

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

// Each warp tells all others its number, and then ten times it, in the same place: without a barrier after the first look.
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
