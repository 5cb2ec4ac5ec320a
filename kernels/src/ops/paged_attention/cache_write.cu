// One block of ROW_THREADS for each row.

#include "device.cuh"

// Rows of `width` numbers that begin `stride` numbers apart, as columns of a wider matrix do.
template <class T>
struct Part {
    const T* rows;
    size_t stride;
    unsigned width;
};

// What lies one after the other in a row of the cache. A part that there is not has no width.
template <class T>
struct Parts {
    Part<T> parts[3];
};

// Stores row `i` of all parts at `slots[i]`; the caller names no slot twice. cache: [num_slots, width], and the
// widths of the parts add up to `width`.
template <class T, class Cache>
static __device__ void cache_write(const Parts<T>& parts, const unsigned* slots, Cache* cache, int width) {
    Cache* target = cache + static_cast<size_t>(slots[blockIdx.x]) * width;
    for (const Part<T>& part : parts.parts) {
        const T* row = part.rows + blockIdx.x * part.stride;
        for (unsigned i = threadIdx.x; i < part.width; i += ROW_THREADS)
            target[i] = from_float<Cache>(to_float(row[i]));
        target += part.width;
    }
}

#define KERNEL(T, Cache)                                                                        \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS) cache_write_##T##_##Cache(        \
        Parts<T> parts, const unsigned* slots, Cache* cache, int width) {                       \
        cache_write<T, Cache>(parts, slots, cache, width);                                      \
    }                                                                                           \
    EXPORT_KERNEL(cache_write_##T##_##Cache)

KERNEL(float, float)
KERNEL(float, bf16)
KERNEL(bf16, float)
KERNEL(bf16, bf16)
