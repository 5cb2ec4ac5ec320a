// Products with weights that are stored as numbers: of a token with one weight, or of each of its heads with a weight
// of its own.

#include "dense_product.cuh"

// weights: [gridDim.z] in device memory, of one shape, or null where `only` is the one weight of all; x: [num_tokens,
// gridDim.z, weight.cols], from a multiple of 16 bytes, as is the weight; out: [num_tokens, gridDim.z, weight.rows]
//
// A block of PRODUCT_THREADS for each 16 * PANELS * PRODUCT_WARPS outputs (x), 8 * TILES tokens (y) and head (z).
template <class T, int PANELS, int TILES>
static __device__ void dense_linear(const DenseWeight* weights, const DenseWeight& only, const bf16* x, T* out,
                                    unsigned num_tokens) {
    using Shared = DenseShared<TILES>;
    SHARED(Shared, shared, 1);
    SHARED(DenseWeight, of_block, 1);
    const DenseWeight& weight = weight_of_head(weights, only, of_block[0]);
    const Rows rows = rows_of_head(num_tokens, TILE_TOKENS * TILES);
    dense_product<T, PANELS, TILES>(weight, blockIdx.x * PANELS * PRODUCT_WARPS, x, rows, out, weight.rows, shared[0]);
}

// A block of ROW_THREADS for each PLAIN_OUTS outputs (x), PLAIN_TOKENS tokens (y) and head (z).
template <class W, class X, class T>
static __device__ void plain_linear(const DenseWeight* weights, const DenseWeight& only, const X* x, T* out,
                                    unsigned num_tokens) {
    SHARED(PlainShared, shared, 1);
    SHARED(DenseWeight, of_block, 1);
    const DenseWeight& weight = weight_of_head(weights, only, of_block[0]);
    const Rows rows = rows_of_head(num_tokens, PLAIN_TOKENS);
    plain_product<W, X, T>(weight, blockIdx.x * PLAIN_OUTS, x, rows, out, weight.rows, shared[0]);
}

#define DENSE(name, T, PANELS, TILES)                                                                          \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 3)                                           \
        name##_##T(const DenseWeight* weights, DenseWeight only, const bf16* x, T* out, unsigned num_tokens) { \
        dense_linear<T, PANELS, TILES>(weights, only, x, out, num_tokens);                                     \
    }                                                                                                          \
    EXPORT_KERNEL(name##_##T)

// Weights, inputs and outputs.
#define PLAIN(W, X, T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                          \
        plain_linear_##W##_##X##_##T(const DenseWeight* weights, DenseWeight only, const X* x, T* out, \
                                     unsigned num_tokens) {                                            \
        plain_linear<W, X, T>(weights, only, x, out, num_tokens);                                      \
    }                                                                                                  \
    EXPORT_KERNEL(plain_linear_##W##_##X##_##T)

// A few tokens, where reading weights is all of the work, and many.
DENSE(dense_linear_few, float, 1, 1)
DENSE(dense_linear_few, bf16, 1, 1)
DENSE(dense_linear_many, float, 2, 4)
DENSE(dense_linear_many, bf16, 2, 4)

PLAIN(float, float, float)
PLAIN(f16, float, float)
PLAIN(bf16, float, float)
PLAIN(float, bf16, float)
PLAIN(f16, bf16, float)
PLAIN(float, bf16, bf16)
PLAIN(f16, bf16, bf16)
