// What the device code of all ops shares: numbers, and what the threads of a block make of theirs together.
//
// Ops compute in f32 whatever their tensors are stored as, and each result by one chain of operations that depends on its
// row alone: never on how many rows there are, nor on which block has it.

#pragma once

#ifdef __CUDACC__
// The emulator finds kernels by their registration, the driver by their symbol.
#define EXPORT_KERNEL(name)
#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(type, name)                                   \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)
#endif

#define ALL_LANES 0xffffffffu
constexpr int WARP_SIZE = 32;
// Threads of a block that works on a row; a sum's order follows from it.
constexpr int ROW_THREADS = 256;
constexpr int ROW_WARPS = ROW_THREADS / WARP_SIZE;

struct bf16 {
    unsigned short bits;
};

struct f16 {
    unsigned short bits;
};

static __device__ __forceinline__ float to_float(float value) { return value; }

static __device__ __forceinline__ float to_float(bf16 value) {
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

static __device__ __forceinline__ float to_float(f16 value) {
    const unsigned sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
    // A product by a power of two puts the exponent right, of denormal numbers too; infinities and NaN have one more.
    const float scaled = __uint_as_float(magnitude << 13) * __uint_as_float((254u - 15u) << 23);
    const unsigned special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    return __uint_as_float(sign | special | __float_as_uint(scaled));
}

template <class T>
__device__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

// To nearest, ties to even; a NaN stays one.
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<unsigned short>((bits >> 16) | 0x40u)};
    return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// A number and its place.
struct Best {
    float value;
    unsigned index;
};

constexpr unsigned NONE = 0xffffffffu;

// The larger, and of equals the first; nothing is below NONE. Values are no NaN.
static __device__ __forceinline__ Best better(Best a, Best b) {
    return b.index != NONE && (a.index == NONE || b.value > a.value || (b.value == a.value && b.index < a.index)) ? b : a;
}

static __device__ __forceinline__ float across(float value, int lanes) { return __shfl_xor_sync(ALL_LANES, value, lanes); }

static __device__ __forceinline__ unsigned across(unsigned value, int lanes) { return __shfl_xor_sync(ALL_LANES, value, lanes); }

static __device__ __forceinline__ Best across(Best best, int lanes) {
    return {__shfl_xor_sync(ALL_LANES, best.value, lanes), __shfl_xor_sync(ALL_LANES, best.index, lanes)};
}

// What ROW_THREADS threads have, merged in one order, in all of them. `scratch` may be used again at once.
template <class T, class Merge>
static __device__ __forceinline__ T row_merge(T value, T (&scratch)[ROW_WARPS], Merge merge) {
    for (int lanes = WARP_SIZE / 2; lanes > 0; lanes /= 2) value = merge(value, across(value, lanes));
    if (threadIdx.x % WARP_SIZE == 0) scratch[threadIdx.x / WARP_SIZE] = value;
    __syncthreads();
    value = scratch[0];
    for (int warp = 1; warp < ROW_WARPS; warp++) value = merge(value, scratch[warp]);
    __syncthreads();
    return value;
}

template <class T>
static __device__ __forceinline__ T row_sum(T value, T (&scratch)[ROW_WARPS]) {
    return row_merge(value, scratch, [](T a, T b) { return a + b; });
}

// A NaN counts for nothing.
static __device__ __forceinline__ float row_max(float value, float (&scratch)[ROW_WARPS]) {
    return row_merge(value, scratch, [](float a, float b) { return fmaxf(a, b); });
}

static __device__ __forceinline__ Best row_best(Best best, Best (&scratch)[ROW_WARPS]) {
    return row_merge(best, scratch, [](Best a, Best b) { return better(a, b); });
}
