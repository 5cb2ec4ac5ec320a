// What a device can do at most. Kernels write nothing as long as no result is what they are told, which it never is: the compiler
// cannot know that.

#include "mma.cuh"

// Sums that do not wait for each other.
constexpr int CHAINS = 8;

// values: count groups of 16 bytes
extern "C" __global__ void __launch_bounds__(ROW_THREADS) limit_read(const uint4* values, unsigned long long count, unsigned never,
                                                                     unsigned* out) {
    unsigned seen = 0;
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * ROW_THREADS;
    for (unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * ROW_THREADS + threadIdx.x; i < count; i += step) {
        const uint4 value = values[i];
        seen |= value.x ^ value.y ^ value.z ^ value.w;
    }
    if (seen == never) out[0] = seen;
}
EXPORT_KERNEL(limit_read)

// A round has CHAINS multiplications and additions of each thread.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) limit_fma(unsigned rounds, float factor, float never, float* out) {
    float sums[CHAINS];
    UNROLL
    for (int chain = 0; chain < CHAINS; chain++) sums[chain] = static_cast<float>(threadIdx.x + chain);
    for (unsigned round = 0; round < rounds; round++) {
        UNROLL
        for (int chain = 0; chain < CHAINS; chain++) sums[chain] = fmaf(sums[chain], factor, factor);
    }
    UNROLL
    for (int chain = 0; chain < CHAINS; chain++)
        if (sums[chain] == never) out[0] = sums[chain];
}
EXPORT_KERNEL(limit_fma)

// A round has CHAINS products of each warp.
template <class T, class Multiply>
static __device__ void multiply(unsigned rounds, unsigned factors, T never, T* out, Multiply product) {
    T sums[CHAINS][4] = {};
    const unsigned a[4] = {factors, factors, factors, factors}, b[2] = {factors, factors};
    for (unsigned round = 0; round < rounds; round++) {
        UNROLL
        for (int chain = 0; chain < CHAINS; chain++) product(sums[chain], a, b);
    }
    UNROLL
    for (int chain = 0; chain < CHAINS; chain++)
        if (sums[chain][0] == never) out[0] = sums[chain][1];
}

#define KERNEL(name, T, product)                                                                              \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                 \
        name(unsigned rounds, unsigned factors, T never, T* out) {                                            \
        multiply(rounds, factors, never, out,                                                                 \
                 [](T(&c)[4], const unsigned(&a)[4], const unsigned(&b)[2]) { product(c, a, b); });           \
    }                                                                                                         \
    EXPORT_KERNEL(name)

// Of [16, 16] and [16, 8].
KERNEL(limit_mma_bf16, float, mma_m16n8k16_bf16)
// Of [16, 32] and [32, 8].
KERNEL(limit_mma_int8, int, mma_m16n8k32_u8_s8)
