// Which rows an expert computes: the pairs of token and slot that chose it, in their order, one expert behind the
// other. Two kernels after each other, each with one block of ROW_THREADS for every expert.

#include "experts.cuh"

// experts: [num_pairs], as routed; is_identity: [gridDim.x]; counts: [gridDim.x], of each expert its rows.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    count_experts(const unsigned* experts, unsigned num_pairs, const unsigned char* is_identity, unsigned* counts) {
    SHARED(unsigned, scratch, ROW_WARPS);
    unsigned count = 0;
    for (unsigned pair = threadIdx.x; pair < num_pairs; pair += ROW_THREADS) count += experts[pair] == blockIdx.x;
    count = row_sum(count, scratch);
    if (threadIdx.x == 0) counts[blockIdx.x] = is_identity[blockIdx.x] ? 0 : count;
}
EXPORT_KERNEL(count_experts)

// pairs: [num_pairs], of each row its pair; rows: [num_pairs], of each pair its row, or what there is in place of one;
// tiles: as many as `tile_rows` can make of the pairs, that is at most num_pairs / tile_rows + min(gridDim.x,
// num_pairs).
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    align_experts(const unsigned* experts, unsigned num_pairs, const unsigned char* is_identity, const unsigned* counts,
                  unsigned tile_rows, unsigned* pairs, unsigned* rows, Tile* tiles, ExpertTotals* totals) {
    SHARED(unsigned, scratch, ROW_WARPS);
    const unsigned own = blockIdx.x, count = counts[own];
    unsigned first_row = 0, first_tile = 0;
    for (unsigned expert = threadIdx.x; expert < own; expert += ROW_THREADS) {
        first_row += counts[expert];
        first_tile += (counts[expert] + tile_rows - 1) / tile_rows;
    }
    first_row = row_sum(first_row, scratch);
    first_tile = row_sum(first_tile, scratch);
    const unsigned num_tiles = (count + tile_rows - 1) / tile_rows, end_row = first_row + count;
    for (unsigned tile = threadIdx.x; tile < num_tiles; tile += ROW_THREADS) {
        const unsigned first = first_row + tile * tile_rows, end = first + tile_rows;
        tiles[first_tile + tile] = {own, first, end < end_row ? end : end_row};
    }
    if (own == gridDim.x - 1 && threadIdx.x == 0) *totals = {first_tile + num_tiles, end_row};

    // The first block also marks what nobody computes.
    if (count == 0 && !is_identity[own] && own != 0) return;
    const unsigned lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    unsigned next = first_row;
    for (unsigned first = 0; first < num_pairs; first += ROW_THREADS) {
        const unsigned pair = first + threadIdx.x;
        const unsigned expert = pair < num_pairs ? experts[pair] : NONE;
        const unsigned found = __ballot_sync(ALL_LANES, expert == own);
        if (lane == 0) scratch[warp] = __popc(found);
        __syncthreads();
        unsigned row = next + __popc(found & ((1u << lane) - 1));
        for (unsigned before = 0; before < ROW_WARPS; before++) {
            if (before < warp) row += scratch[before];
            next += scratch[before];
        }
        if (expert == own) {
            rows[pair] = is_identity[own] ? INPUT_ROW : row;
            if (!is_identity[own]) pairs[row] = pair;
        }
        if (own == 0 && pair < num_pairs && expert >= gridDim.x) rows[pair] = NONE;
        __syncthreads();
    }
}
EXPORT_KERNEL(align_experts)
