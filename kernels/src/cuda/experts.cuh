// The rows of experts: pairs of a token and a slot that chose the same expert follow each other.

#pragma once

#include "product.cuh"

// In place of a row: the pair's expert gives back its input. Of a pair without an expert it is NONE.
constexpr unsigned INPUT_ROW = 0xfffffffeu;

// Rows of one expert that a block computes together.
struct Tile {
    unsigned expert, first, end;
};

// Inputs are tokens where there are pairs, and else rows.
static __device__ __forceinline__ Rows rows_of_tile(const Tile& tile, const unsigned* pairs, unsigned top_k) {
    return {pairs, top_k, tile.first, 1, tile.end - tile.first};
}

// Of all experts.
struct ExpertTotals {
    unsigned num_tiles, num_rows;
};
