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
// What a lane can show to the others of its warp at once: its parts of the factors of a matrix instruction.
constexpr int EXCHANGE_BYTES = 24;
// Of this thread's warp, one of two sets in turn.
unsigned char (*exchange())[EXCHANGE_BYTES];
unsigned lane();
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

// What all lanes of a warp show.
template <class T>
class Shown {
  public:
    explicit Shown(const T& value) : slots(exchange()) {
        static_assert(sizeof(T) <= EXCHANGE_BYTES);
        std::memcpy(slots[lane()], &value, sizeof value);
        warp_barrier();
    }

    const T& of(unsigned source) const { return *reinterpret_cast<const T*>(slots[source % WARP]); }

  private:
    unsigned char (*slots)[EXCHANGE_BYTES];
};

template <class T>
T shuffle(T value, unsigned source) {
    return Shown<T>(value).of(source);
}

// cp.async: `valid` bytes, and zeros behind them up to `bytes`.
void copy_later(void* to, const void* from, std::size_t bytes, std::size_t valid);
// cp.async.commit_group
void commit_copies();
// cp.async.wait_group: all groups but so many of the last.
void wait_for_copies(unsigned left);

// prmt.b32: byte `selectors[i]` of `low` and `high`, or its highest bit eight times where the selector's fourth bit is
// set.
unsigned permute_bytes(unsigned low, unsigned high, unsigned selectors);
// mma.sync.m16n8k32.row.col.s32.u8.s8.s32
void mma_u8_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
// mma.sync.m16n8k16.row.col.f32.bf16.bf16.f32; a GPU may round otherwise.
void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

}  // namespace emulate

#define threadIdx (emulate::place().thread)
#define blockIdx (emulate::place().block)
#define blockDim (emulate::place().block_size)
#define gridDim (emulate::place().grid_size)

#define EXPORT_KERNEL(name) static const emulate::Registration registered_##name(#name, &emulate::Kernel<name>::call);
#define SHARED(type, name, count)     \
    static const char key_##name = 0; \
    type(&name)[count] = *static_cast<type(*)[count]>(emulate::static_shared(&key_##name, sizeof(type[count]), alignof(type)))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulate::dynamic_shared())

static inline void __syncthreads() { emulate::block_barrier(); }

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
struct alignas(16) float4 {
    float x, y, z, w;
};

static inline unsigned __ballot_sync(unsigned, bool is_set) {
    const emulate::Shown<bool> all(is_set);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < emulate::WARP; lane++) bits |= static_cast<unsigned>(all.of(lane)) << lane;
    return bits;
}
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

static inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
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
