// Products with quantized weights: of a token with one weight, or of each of its heads with a weight of its own.

#include "quant_product.cuh"

// A block of PRODUCT_THREADS for each 16 * PANELS * PRODUCT_WARPS outputs (x), 8 * TILES tokens (y) and head (z).
//
// weights: [gridDim.z] in device memory, of one shape; out: [num_tokens, gridDim.z, weight.rows]; input rows are those of
// [num_tokens, gridDim.z], in the form of the weights.
template <class T, int PANELS, int TILES>
static __device__ __forceinline__ void quant_linear(const QuantWeight* weights, const QuantRows& input, T* out,
                                                    unsigned num_tokens) {
    using Shared = ProductShared<PANELS, TILES>;
    SHARED(Shared, shared, 1);
    const QuantWeight weight = weights[blockIdx.z];
    const unsigned first = blockIdx.y * 8 * TILES, left = num_tokens - first, tokens = 8 * TILES;
    const Rows rows = {nullptr, 1, first * gridDim.z + blockIdx.z, gridDim.z, left < tokens ? left : tokens};
    quant_product<T, PANELS, TILES>(weight, blockIdx.x * PANELS * PRODUCT_WARPS, input, rows, out, weight.rows, shared[0]);
}

// A few tokens, where reading weights is all of the work, and many.
#define KERNELS(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 4)                                                         \
        quant_linear_few_##T(const QuantWeight* weights, QuantRows input, T* out, unsigned num_tokens) {                  \
        quant_linear<T, 1, 1>(weights, input, out, num_tokens);                                                           \
    }                                                                                                                     \
    EXPORT_KERNEL(quant_linear_few_##T)                                                                                   \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 3)                                                         \
        quant_linear_many_##T(const QuantWeight* weights, QuantRows input, T* out, unsigned num_tokens) {                 \
        quant_linear<T, 2, 4>(weights, input, out, num_tokens);                                                           \
    }                                                                                                                     \
    EXPORT_KERNEL(quant_linear_many_##T)

KERNELS(float)
KERNELS(bf16)
