// A thread for each number, in blocks of ROW_THREADS.

#include "pointwise.cuh"

template <class T>
static __device__ void map(const T* x, T* out, unsigned long long len, unsigned function) {
    const size_t at = static_cast<size_t>(blockIdx.x) * ROW_THREADS + threadIdx.x;
    if (at < len) out[at] = from_float<T>(pointwise(static_cast<Pointwise>(function), to_float(x[at])));
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS) pointwise_##T(const T* x, T* out, unsigned long long len, \
                                                                            unsigned function) {                       \
        map<T>(x, out, len, function);                                                                                 \
    }                                                                                                                  \
    EXPORT_KERNEL(pointwise_##T)

KERNELS(float)
KERNELS(bf16)
