// One of the two matrices of experts whose weights are stored as numbers, for all tiles of rows.

#include "dense_product.cuh"
#include "experts.cuh"

// weights: of each expert; one without values is another launch's. Input rows are tokens where `pairs` says which, and
// else rows, `weight.cols` wide, from a multiple of 16 bytes, as are the weights. out: [num_rows, out_width]

// A block of PRODUCT_THREADS for each 16 * PANELS * PRODUCT_WARPS outputs of the expert that has most (x), and for as
// many tiles as there may be (y), of 8 * TILES rows at most.
template <int PANELS, int TILES>
static __device__ void dense_experts(const DenseWeight* weights, const bf16* x, const Tile* tiles,
                                     const ExpertTotals* totals, const unsigned* pairs, unsigned top_k, bf16* out,
                                     unsigned out_width) {
    using Shared = DenseShared<TILES>;
    SHARED(Shared, shared, 1);
    if (blockIdx.y >= totals->num_tiles) return;
    const Tile tile = tiles[blockIdx.y];
    const DenseWeight& weight = weights[tile.expert];
    const unsigned first_panel = blockIdx.x * PANELS * PRODUCT_WARPS;
    if (weight.values == nullptr || first_panel * PANEL_ROWS >= weight.rows) return;
    const Rows rows = rows_of_tile(tile, pairs, top_k);
    dense_product<bf16, PANELS, TILES>(weight, first_panel, x, rows, out, out_width, shared[0]);
}

// A block of ROW_THREADS for each PLAIN_OUTS outputs (x), and for as many tiles as there may be (y), of PLAIN_TOKENS
// rows at most.
template <class W, class X>
static __device__ void plain_experts(const DenseWeight* weights, const X* x, const Tile* tiles,
                                     const ExpertTotals* totals, const unsigned* pairs, unsigned top_k, X* out,
                                     unsigned out_width) {
    SHARED(PlainShared, shared, 1);
    if (blockIdx.y >= totals->num_tiles) return;
    const Tile tile = tiles[blockIdx.y];
    const DenseWeight& weight = weights[tile.expert];
    const unsigned first_out = blockIdx.x * PLAIN_OUTS;
    if (weight.values == nullptr || first_out >= weight.rows) return;
    plain_product<W, X, X>(weight, first_out, x, rows_of_tile(tile, pairs, top_k), out, out_width, shared[0]);
}

#define DENSE(name, PANELS, TILES)                                                                     \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 3)                                   \
        name(const DenseWeight* weights, const bf16* x, const Tile* tiles, const ExpertTotals* totals, \
             const unsigned* pairs, unsigned top_k, bf16* out, unsigned out_width) {                   \
        dense_experts<PANELS, TILES>(weights, x, tiles, totals, pairs, top_k, out, out_width);         \
    }                                                                                                  \
    EXPORT_KERNEL(name)

// Weights, and inputs and outputs.
#define PLAIN(W, X)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                          \
        plain_experts_##W##_##X(const DenseWeight* weights, const X* x, const Tile* tiles, const ExpertTotals* totals, \
                                const unsigned* pairs, unsigned top_k, X* out, unsigned out_width) {                   \
        plain_experts<W, X>(weights, x, tiles, totals, pairs, top_k, out, out_width);                                  \
    }                                                                                                                  \
    EXPORT_KERNEL(plain_experts_##W##_##X)

// Tiles of a few rows and of many.
DENSE(dense_experts_few_bf16, 1, 1)
DENSE(dense_experts_many_bf16, 2, 4)

PLAIN(float, float)
PLAIN(f16, float)
PLAIN(bf16, float)
PLAIN(float, bf16)
PLAIN(f16, bf16)
