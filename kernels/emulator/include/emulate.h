// What device code needs of CUDA, on a CPU: each thread of a block is a coroutine that gives way at barriers.
//
// Included before every .cu file. Blocks run one after the other. Each warp runs to its next barrier before another one
// does, in an order that the launch chooses, and shared memory is NaN until it is written: code that misses a barrier
// gives other results in one order than in another. Copies that run beside the code are made at once in one order and
// as late as may be in another. A barrier that not all threads reach, and a write behind shared memory, end the launch
// with an error. Barriers at two places of the code are not told apart, the lanes of a shuffle are not looked at, and
// nothing here says how fast anything is or what a GPU's own approximations give.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulate {

struct Index {
    unsigned x, y, z;
};

struct Place {
    Index thread, block, block_size, grid_size;
};

constexpr int WARP = 32;

const Place& place();
// Waits for all threads of the block.
void block_barrier();
// Waits for all threads of the warp.
void warp_barrier();
constexpr std::size_t SLOT_BYTES = 32;

// Of this thread's warp: a slot for each lane, one of two sets in turn.
unsigned char (*exchange())[SLOT_BYTES];
unsigned lane();
// Threads of this thread's warp.
unsigned warp_size();
void* dynamic_shared();
// Shared memory of this block for whoever has this key.
void* static_shared(const void* key, std::size_t bytes, std::size_t alignment);

void add(const char* name, void (*call)(void**));

template <auto Function>
struct Kernel;

// Calls a kernel with arguments at these addresses.
template <class... Arguments, void (*Function)(Arguments...)>
struct Kernel<Function> {
    static void call(void** at) { spread(at, std::index_sequence_for<Arguments...>{}); }

    template <std::size_t... Number>
    static void spread(void** at, std::index_sequence<Number...>) {
        Function(*static_cast<Arguments*>(at[Number])...);
    }
};

struct Registration {
    Registration(const char* name, void (*call)(void**)) { add(name, call); }
};

// What each lane of the warp has, once all of them are here.
template <class T>
class OfWarp {
  public:
    explicit OfWarp(const T& own) : slots(exchange()) {
        static_assert(sizeof(T) <= SLOT_BYTES);
        std::memcpy(slots[lane()], &own, sizeof own);
        warp_barrier();
    }

    T operator[](unsigned lane) const {
        T found;
        std::memcpy(&found, slots[lane % WARP], sizeof found);
        return found;
    }

  private:
    unsigned char (*slots)[SLOT_BYTES];
};

template <class T>
T shuffle(T value, unsigned source) {
    return OfWarp<T>(value)[source];
}

// One of the two bf16 of a register, the first in its lower half.
inline float half_of(unsigned both, unsigned half) {
    const unsigned bits = both >> (16 * half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// What a lane has of the factors of a product.
struct Fragments {
    unsigned a[4], b[2];
};

inline Fragments fragments(const unsigned (&a)[4], const unsigned (&b)[2]) {
    return {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
}

// `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`: c += a * b with the fragments of the PTX manual. Here a sum
// is rounded once; a GPU's order and roundings are its own.
inline void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const OfWarp<Fragments> of(fragments(a, b));
    const unsigned group = lane() / 4, pair = lane() % 4 * 2;
    double rows[2][16], columns[2][16];
    for (unsigned k = 0; k < 16; k++) {
        const unsigned other = k % 8 / 2;
        const Fragments row = of[group * 4 + other];
        for (unsigned i = 0; i < 2; i++) {
            rows[i][k] = half_of(row.a[i + k / 8 * 2], k % 2);
            columns[i][k] = half_of(of[(pair + i) * 4 + other].b[k / 8], k % 2);
        }
    }
    for (unsigned i = 0; i < 4; i++) {
        double sum = c[i];
        for (unsigned k = 0; k < 16; k++) sum += rows[i / 2][k] * columns[i % 2][k];
        c[i] = static_cast<float>(sum);
    }
}

// `mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32`, of bytes in integers.
inline void mma_m16n8k32_u8_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const OfWarp<Fragments> of(fragments(a, b));
    const unsigned group = lane() / 4, pair = lane() % 4 * 2;
    int rows[2][32], columns[2][32];
    for (unsigned k = 0; k < 32; k++) {
        const unsigned other = k % 16 / 4, shift = k % 4 * 8;
        const Fragments row = of[group * 4 + other];
        for (unsigned i = 0; i < 2; i++) {
            rows[i][k] = static_cast<unsigned char>(row.a[i + k / 16 * 2] >> shift);
            columns[i][k] = static_cast<signed char>(of[(pair + i) * 4 + other].b[k / 16] >> shift);
        }
    }
    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 32; k++) c[i] += rows[i / 2][k] * columns[i % 2][k];
}

// `prmt.b32`: byte `selectors[i]` of `low` and `high`, or its highest bit eight times where the selector's fourth bit
// is set.
inline unsigned permute_bytes(unsigned low, unsigned high, unsigned selectors) {
    unsigned result = 0;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned selector = selectors >> (4 * i) & 15;
        unsigned byte = (selector & 4 ? high : low) >> (8 * (selector & 3)) & 0xff;
        if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}

// `ldmatrix.sync.aligned.m8n8.x{N}.shared.b16`, of `.trans` too: N matrices of [8, 8] numbers of two bytes. Lane `l`
// says where row `l % 8` of matrix `l / 8` begins, at a multiple of 16 bytes.
template <unsigned N>
void ldmatrix(unsigned (&out)[N], const void* row, bool is_transposed) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) std::abort();
    const OfWarp<const unsigned char*> of(static_cast<const unsigned char*>(row));
    for (unsigned matrix = 0; matrix < N; matrix++) {
        unsigned short both[2];
        for (unsigned i = 0; i < 2; i++) {
            unsigned row_idx = lane() / 4, column = lane() % 4 * 2 + i;
            if (is_transposed) std::swap(row_idx, column);
            std::memcpy(&both[i], of[matrix * 8 + row_idx] + 2 * column, 2);
        }
        out[matrix] = both[0] | static_cast<unsigned>(both[1]) << 16;
    }
    // Nobody goes on and writes there while another lane still reads.
    warp_barrier();
}

// `cp.async`: what was asked for is there when it was waited for, or at once, as the launch chooses.
void copy_async(void* target, const void* source, std::size_t bytes, std::size_t zeros);
void commit_copies();
// Waits for all groups but so many.
void wait_for_copies(unsigned num_left);

}  // namespace emulate

#define threadIdx (emulate::place().thread)
#define blockIdx (emulate::place().block)
#define blockDim (emulate::place().block_size)
#define gridDim (emulate::place().grid_size)

#define EXPORT_KERNEL(name) static const emulate::Registration registered_##name(#name, &emulate::Kernel<name>::call);
#define UNROLL
#define SHARED(type, name, count)     \
    static const char key_##name = 0; \
    type(&name)[count] = *static_cast<type(*)[count]>(emulate::static_shared(&key_##name, sizeof(type[count]), alignof(type)))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulate::dynamic_shared())

static inline void __syncthreads() { emulate::block_barrier(); }
static inline void __syncwarp() { emulate::warp_barrier(); }

template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int lanes) {
    return emulate::shuffle(value, emulate::lane() ^ static_cast<unsigned>(lanes));
}

// As CUDA has them: vectors that are loaded at once.
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};

// A lane whose thread does not exist holds nothing.
static inline unsigned __ballot_sync(unsigned, bool holds) {
    auto* slots = emulate::exchange();
    slots[emulate::lane()][0] = holds;
    emulate::warp_barrier();
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < emulate::warp_size(); lane++)
        if (slots[lane][0]) ballot |= 1u << lane;
    return ballot;
}

static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

static inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
