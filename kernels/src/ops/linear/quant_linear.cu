// Products with quantized weights: of a token with one weight, or of each of its heads with a weight of its own.

#include "quant_product.cuh"

// A block of PRODUCT_THREADS for each 16 * PANELS * PRODUCT_WARPS outputs (x), TILE_TOKENS * TILES tokens (y) and head
// (z).
//
// weights: [gridDim.z] in device memory, of one shape, or null where `only` is the one weight of all; out: [num_tokens,
// gridDim.z, weight.rows]; input rows are those of [num_tokens, gridDim.z], in the form of the weights.
template <class T, int PANELS, int TILES>
static __device__ void quant_linear(const QuantWeight* weights, const QuantWeight& only, const QuantRows& input, T* out,
                                    unsigned num_tokens) {
    using Shared = ProductShared<PANELS, TILES>;
    SHARED(Shared, shared, 1);
    SHARED(QuantWeight, of_block, 1);
    const QuantWeight& weight = weight_of_head(weights, only, of_block[0]);
    const Rows rows = rows_of_head(num_tokens, TILE_TOKENS * TILES);
    const unsigned first_panel = blockIdx.x * PANELS * PRODUCT_WARPS;
    quant_product<T, PANELS, TILES>(weight, first_panel, input, rows, out, weight.rows, shared[0]);
}

#define KERNEL(name, T, PANELS, TILES, BLOCKS)                                                                   \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, BLOCKS)                                        \
        name##_##T(const QuantWeight* weights, QuantWeight only, QuantRows input, T* out, unsigned num_tokens) { \
        quant_linear<T, PANELS, TILES>(weights, only, input, out, num_tokens);                                   \
    }                                                                                                            \
    EXPORT_KERNEL(name##_##T)

// A few tokens, where reading weights is all of the work, and many.
KERNEL(quant_linear_few, float, 1, 1, 4)
KERNEL(quant_linear_few, bf16, 1, 1, 4)
KERNEL(quant_linear_many, float, 2, 4, 3)
KERNEL(quant_linear_many, bf16, 2, 4, 3)
