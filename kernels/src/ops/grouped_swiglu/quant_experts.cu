// One of the two matrices of quantized experts, for all tiles of rows.

#include "experts.cuh"
#include "quant_product.cuh"

// A block of PRODUCT_THREADS for each 16 * PANELS * PRODUCT_WARPS outputs of the expert that has most (x), and for as
// many tiles as there may be (y), of TILE_TOKENS * TILES rows at most.
//
// weights: of each expert; one without bytes is another launch's, since all that are here have the form of the input.
// Input rows are tokens where `pairs` says which, and else rows. out: [num_rows, out_width]
template <class T, int PANELS, int TILES>
static __device__ void quant_experts(const QuantWeight* weights, const QuantRows& input, const Tile* tiles,
                                     const ExpertTotals* totals, const unsigned* pairs, unsigned top_k, T* out,
                                     unsigned out_width) {
    using Shared = ProductShared<PANELS, TILES>;
    SHARED(Shared, shared, 1);
    if (blockIdx.y >= totals->num_tiles) return;
    const Tile tile = tiles[blockIdx.y];
    const QuantWeight& weight = weights[tile.expert];
    const unsigned first_panel = blockIdx.x * PANELS * PRODUCT_WARPS;
    if (weight.bytes == nullptr || first_panel * PANEL_ROWS >= weight.rows) return;
    const Rows rows = rows_of_tile(tile, pairs, top_k);
    quant_product<T, PANELS, TILES>(weight, first_panel, input, rows, out, out_width, shared[0]);
}

#define KERNEL(name, T, PANELS, TILES, BLOCKS)                                                                 \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, BLOCKS)                                      \
        name##_##T(const QuantWeight* weights, QuantRows input, const Tile* tiles, const ExpertTotals* totals, \
                   const unsigned* pairs, unsigned top_k, T* out, unsigned out_width) {                        \
        quant_experts<T, PANELS, TILES>(weights, input, tiles, totals, pairs, top_k, out, out_width);          \
    }                                                                                                          \
    EXPORT_KERNEL(name##_##T)

// Tiles of a few rows and of many.
KERNEL(quant_experts_few, float, 1, 1, 4)
KERNEL(quant_experts_few, bf16, 1, 1, 4)
KERNEL(quant_experts_many, float, 2, 4, 3)
KERNEL(quant_experts_many, bf16, 2, 4, 3)
