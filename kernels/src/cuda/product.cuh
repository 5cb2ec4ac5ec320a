// What products have in common: which rows a block multiplies, and where the results of a matrix instruction go.

#pragma once

#include "mma.cuh"

constexpr int PRODUCT_THREADS = 128;
constexpr int PRODUCT_WARPS = PRODUCT_THREADS / WARP_SIZE;

// Weights are the rows of a matrix instruction, a panel at a time, and tokens its columns.
constexpr int PANEL_ROWS = 16;
constexpr int TILE_TOKENS = 8;
// Of a panel, a lane has two rows that follow each other, 2 * (lane / 4), and of the columns eight that do.
constexpr int LANE_COLS = 8;

// Some rows of inputs and of outputs.
struct Rows {
    // Pair of token and slot of each output, whose token is its input; null where an output has the input of its
    // number.
    const unsigned* pairs;
    unsigned top_k;
    // First output, the distance of two, and how many there are.
    unsigned first, step, count;

    __device__ __forceinline__ unsigned target(unsigned idx) const { return first + idx * step; }

    __device__ __forceinline__ unsigned source(unsigned idx) const {
        return pairs == nullptr ? target(idx) : pairs[target(idx)] / top_k;
    }
};

// Of a block of so many tokens (y) of one head of all (z): inputs and outputs are [num_tokens, gridDim.z] rows.
static __device__ __forceinline__ Rows rows_of_head(unsigned num_tokens, unsigned block_tokens) {
    const unsigned first = blockIdx.y * block_tokens, left = num_tokens - first;
    return {nullptr, 1, first * gridDim.z + blockIdx.z, gridDim.z, left < block_tokens ? left : block_tokens};
}

// The weight of a block's head, which is the only one where there is no table of them. It is read from shared memory,
// where it takes no registers.
template <class Weight>
static __device__ __forceinline__ const Weight& weight_of_head(const Weight* weights, const Weight& only,
                                                               Weight& shared) {
    if (threadIdx.x == 0) shared = weights == nullptr ? only : weights[blockIdx.z];
    __syncthreads();
    return shared;
}

// The row of inputs of each token of a block.
template <unsigned TOKENS>
static __device__ __forceinline__ void find_sources(const Rows& rows, unsigned (&sources)[TOKENS]) {
    for (unsigned i = threadIdx.x; i < TOKENS; i += PRODUCT_THREADS) sources[i] = i < rows.count ? rows.source(i) : 0;
    __syncthreads();
}

// Writes a lane's results, plus the bias, as far as there are outputs and tokens: `values[panel][tile][i]` is row
// 2 * (lane / 4) + i / 2 of a panel and token 2 * (lane % 4) + i % 2 of a tile.
template <class T, int PANELS, int TILES>
static __device__ __forceinline__ void store(const float (&values)[PANELS][TILES][4], unsigned first_panel,
                                             unsigned num_outs, const float* bias, const Rows& rows, T* out,
                                             unsigned out_width) {
    const int lane = threadIdx.x % WARP_SIZE;
    UNROLL for (int p = 0; p < PANELS; p++)
        UNROLL for (int tile = 0; tile < TILES; tile++)
            UNROLL for (int i = 0; i < 4; i++) {
                const unsigned col = (first_panel + p) * PANEL_ROWS + 2 * (lane / 4) + i / 2;
                const unsigned token = tile * TILE_TOKENS + lane % 4 * 2 + i % 2;
                if (col >= num_outs || token >= rows.count) continue;
                const float value = bias == nullptr ? values[p][tile][i] : __fadd_rn(values[p][tile][i], bias[col]);
                out[static_cast<size_t>(rows.target(token)) * out_width + col] = from_float<T>(value);
            }
}
