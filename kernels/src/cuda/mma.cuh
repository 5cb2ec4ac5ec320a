// Instructions of tensor cores and what brings them their operands, each in a function of its name in PTX. All but
// `cp_async` are for whole warps. `emulate.h` has what they are on a CPU.

#pragma once

#include "device.cuh"

#ifdef __CUDACC__
static __device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// The first in the lower half, as fragments have them.
static __device__ __forceinline__ unsigned both(bf16 first, bf16 second) {
    return first.bits | static_cast<unsigned>(second.bits) << 16;
}

// c += a * b of [16, 16] and [16, 8]. Lane `4 * g + t` has
//   a: rows g and g + 8 of columns 2t and 2t + 1, then the same rows of columns 2t + 8 and 2t + 9,
//   b: rows 2t and 2t + 1 of column g, then rows 2t + 8 and 2t + 9,
//   c: columns 2t and 2t + 1 of row g, then of row g + 8.
static __device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4],
                                                         const unsigned (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulate::mma_m16n8k16_bf16(c, a, b);
#endif
}

// The same of [16, 32] unsigned bytes and [32, 8] signed ones in integers: four neighbours in a register, 4t to 4t + 3
// of the first half of 32 and then of the second, where bf16 has two of 16.
static __device__ __forceinline__ void mma_m16n8k32_u8_s8(int (&c)[4], const unsigned (&a)[4],
                                                          const unsigned (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulate::mma_m16n8k32_u8_s8(c, a, b);
#endif
}

// Four bytes of `low` (0 to 3) and `high` (4 to 7) by the halves of the first two bytes of `selectors`; one of 8 or
// more gives the highest bit of the byte, eight times. Of any thread.
static __device__ __forceinline__ unsigned permute_bytes(unsigned low, unsigned high, unsigned selectors) {
#ifdef __CUDACC__
    unsigned result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selectors));
    return result;
#else
    return emulate::permute_bytes(low, high, selectors);
#endif
}

// Matrices of [8, 8] bf16 in shared memory: lane `l` says where row `l % 8` of matrix `l / 8` begins, at a multiple
// of 16 bytes, and gets columns 2t and 2t + 1 of row g of each.
static __device__ __forceinline__ void ldmatrix_x2(unsigned (&out)[2], const bf16* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulate::ldmatrix(out, row, false);
#endif
}

static __device__ __forceinline__ void ldmatrix_x4(unsigned (&out)[4], const bf16* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulate::ldmatrix(out, row, false);
#endif
}

// The same of the transposed matrices: rows 2t and 2t + 1 of column g.
static __device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&out)[4], const bf16* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulate::ldmatrix(out, row, true);
#endif
}

// Copies BYTES to shared memory, or zeros if `is_there` is false, while the thread goes on. Both ends are at multiples
// of BYTES, and the source is memory of the device in either case.
template <int BYTES = 16>
static __device__ __forceinline__ void cp_async(void* target, const void* source, bool is_there) {
    static_assert(BYTES == 8 || BYTES == 16);
#ifdef __CUDACC__
    const unsigned to = shared_address(target), size = is_there ? BYTES : 0;
    const size_t from = __cvta_generic_to_global(source);
    // Past the first-level cache only whole vectors can go.
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
#else
    emulate::copy_async(target, source, is_there ? BYTES : 0, is_there ? 0 : BYTES);
#endif
}

// Makes a group of the thread's copies since the last one.
static __device__ __forceinline__ void cp_async_commit_group() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulate::commit_copies();
#endif
}

// Waits for the thread's own copies but those of its last LEFT groups; a barrier later all threads see them.
template <int LEFT>
static __device__ __forceinline__ void cp_async_wait_group() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#else
    emulate::wait_for_copies(LEFT);
#endif
}
