// Instructions that C++ has no word for: products of small matrices by a warp, copies beside the code.
//
// A product is `a * b` of 16 rows and 8 columns. Registers of lane l, where a register holds neighbours of the inner
// dimension, the l % 4-th of either of its halves:
//   a: row l / 4 of the first half, row l / 4 + 8 of it, and the same two of the second half
//   b: column l / 4 of the first half and of the second
//   c: row l / 4 of columns 2 * (l % 4) and the next, and the same two of row l / 4 + 8

#pragma once

#include "device.cuh"

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

// c += a * b in integers, over 32 unsigned bytes of `a` and signed ones of `b`.
static __device__ __forceinline__ void mma_u8_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulate::mma_u8_s8(c, a, b);
#endif
}

// c += a * b in f32, over 16 numbers in bf16, the lower half of a register first.
static __device__ __forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulate::mma_bf16(c, a, b);
#endif
}

// Four bytes of `low` (0 to 3) and `high` (4 to 7) by the halves of the first two bytes of `selectors`; one of 8 or
// more gives the highest bit of the byte, eight times.
static __device__ __forceinline__ unsigned permute_bytes(unsigned low, unsigned high, unsigned selectors) {
#ifdef __CUDACC__
    unsigned result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selectors));
    return result;
#else
    return emulate::permute_bytes(low, high, selectors);
#endif
}

// Starts the copy of 8 or 16 aligned bytes to shared memory; zeros in their place if they are not there.
template <int BYTES>
static __device__ __forceinline__ void copy_async(void* shared, const void* global, bool is_there) {
    static_assert(BYTES == 8 || BYTES == 16);
#ifdef __CUDACC__
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared)), valid = is_there ? BYTES : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(to), "l"(global), "n"(BYTES), "r"(valid)
                 : "memory");
#else
    emulate::copy_later(shared, global, BYTES, is_there ? BYTES : 0);
#endif
}

// Ends a group of this thread's copies, which may be empty.
static __device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulate::commit_copies();
#endif
}

// Waits for all groups of this thread's copies but the last LEFT.
template <int LEFT>
static __device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#else
    emulate::wait_for_copies(LEFT);
#endif
}
