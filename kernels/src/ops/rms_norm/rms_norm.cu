// One block of ROW_THREADS for each row.

#include "device.cuh"

// Scales a row by its root mean square.
template <class T>
static __device__ void normalize(const T* x, const float* weight, T* out, int width, float eps) {
    SHARED(float, scratch, ROW_WARPS);
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += ROW_THREADS) {
        const float value = to_float(x[i]);
        squares = __fmaf_rn(value, value, squares);
    }
    const float scale = 1.0f / sqrtf(row_sum(squares, scratch) / static_cast<float>(width) + eps);
    for (int i = threadIdx.x; i < width; i += ROW_THREADS) out[i] = from_float<T>(to_float(x[i]) * scale * weight[i]);
}

// x, out: [rows, width]
template <class T>
static __device__ void rms_norm(const T* x, const float* weight, T* out, int width, float eps) {
    const size_t start = static_cast<size_t>(blockIdx.x) * width;
    normalize(x + start, weight, out + start, width, eps);
}

// The norm of x + residual, and the sum as it is stored, which is what the norm is of.
template <class T>
static __device__ void rms_norm_residual(const T* x, const T* residual, const float* weight, T* norm, T* sum, int width, float eps) {
    const size_t start = static_cast<size_t>(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += ROW_THREADS)
        sum[start + i] = from_float<T>(to_float(x[start + i]) + to_float(residual[start + i]));
    // Each thread reads back what it wrote itself.
    normalize(sum + start, weight, norm + start, width, eps);
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                          \
        rms_norm_##T(const T* x, const float* weight, T* out, int width, float eps) {                                  \
        rms_norm<T>(x, weight, out, width, eps);                                                                       \
    }                                                                                                                  \
    EXPORT_KERNEL(rms_norm_##T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS) rms_norm_residual_##T(                                   \
        const T* x, const T* residual, const float* weight, T* norm, T* sum, int width, float eps) {                   \
        rms_norm_residual<T>(x, residual, weight, norm, sum, width, eps);                                              \
    }                                                                                                                  \
    EXPORT_KERNEL(rms_norm_residual_##T)

KERNELS(float)
KERNELS(bf16)
