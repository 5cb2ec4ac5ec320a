// What device code needs of CUDA, on a CPU: each thread of a block is a coroutine that gives way at barriers.
//
// Included before every .cu file. Blocks run one after the other. Each warp runs to its next barrier before another one does, in
// an order that the launch chooses, and shared memory is NaN until it is written: code that misses a barrier gives
// other results in one order than in another. A barrier that not all threads reach, and a write behind shared
// memory, end the launch with an error. Barriers at two places of the code are not told apart, the lanes of a shuffle
// are not looked at, and nothing here says how fast anything is or what a GPU's own approximations give.

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
    Index thread, block, block_size;
};

constexpr int WARP = 32;

const Place& place();
// Waits for all threads of the block.
void block_barrier();
// Waits for all threads of the warp.
void warp_barrier();
// Of this thread's warp: 8 bytes for each lane, one of two sets in turn.
unsigned char (*exchange())[8];
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

template <class T>
T shuffle(T value, unsigned source) {
    static_assert(sizeof(T) <= 8);
    auto* slots = exchange();
    std::memcpy(slots[lane()], &value, sizeof value);
    warp_barrier();
    T found;
    std::memcpy(&found, slots[source % WARP], sizeof found);
    return found;
}

}  // namespace emulate

#define threadIdx (emulate::place().thread)
#define blockIdx (emulate::place().block)
#define blockDim (emulate::place().block_size)

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

static inline void __syncwarp() { emulate::warp_barrier(); }

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
