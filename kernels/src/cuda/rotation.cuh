// The Hadamard matrix of 64 columns, by which some rows are turned: `quant/rotation.rs` says it.

#pragma once

#include "device.cuh"

// Neighbours of a lane.
constexpr int LANE_QUAD = 4;
// Columns that are turned together.
constexpr int ROTATED_COLS = 64;

// Multiplies 64 columns of 16 lanes by the matrix, which is its own inverse: sums and differences of numbers 1, 2, … 32
// apart.
static __device__ __forceinline__ void rotate(float (&x)[LANE_QUAD], int lane) {
    UNROLL for (int distance = 1; distance < LANE_QUAD; distance *= 2) {
        float turned[LANE_QUAD];
        UNROLL for (int i = 0; i < LANE_QUAD; i++)
            turned[i] = i & distance ? x[i - distance] - x[i] : x[i] + x[i + distance];
        UNROLL for (int i = 0; i < LANE_QUAD; i++) x[i] = turned[i];
    }
    UNROLL for (int lanes = 1; lanes < ROTATED_COLS / LANE_QUAD; lanes *= 2)
        UNROLL for (int i = 0; i < LANE_QUAD; i++) {
            const float other = across(x[i], lanes);
            x[i] = lane & lanes ? other - x[i] : x[i] + other;
        }
    UNROLL for (int i = 0; i < LANE_QUAD; i++) x[i] *= 0.125f;
}
