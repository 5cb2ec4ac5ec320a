// One block of ROW_THREADS for each row.

#include "device.cuh"

// x, out: [rows, width]
template <class T>
static __device__ void layer_norm(const T* x, const float* weight, const float* bias, T* out, int width, float eps) {
    SHARED(float, scratch, ROW_WARPS);
    const size_t start = static_cast<size_t>(blockIdx.x) * width;
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += ROW_THREADS) sum += to_float(x[start + i]);
    const float mean = row_sum(sum, scratch) / static_cast<float>(width);
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += ROW_THREADS) {
        const float distance = to_float(x[start + i]) - mean;
        squares = __fmaf_rn(distance, distance, squares);
    }
    const float scale = 1.0f / sqrtf(row_sum(squares, scratch) / static_cast<float>(width) + eps);
    for (int i = threadIdx.x; i < width; i += ROW_THREADS)
        out[start + i] = from_float<T>(__fmaf_rn((to_float(x[start + i]) - mean) * scale, weight[i], bias[i]));
}

#define KERNELS(T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                \
        layer_norm_##T(const T* x, const float* weight, const float* bias, T* out, int width, float eps) {   \
        layer_norm<T>(x, weight, bias, out, width, eps);                                                     \
    }                                                                                                        \
    EXPORT_KERNEL(layer_norm_##T)

KERNELS(float)
KERNELS(bf16)
