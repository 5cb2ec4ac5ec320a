// Which rows a block multiplies, and where its results go.

#pragma once

#include "device.cuh"

// Some rows of inputs and of outputs.
struct Rows {
    // Pair of token and slot of each output, whose token is its input; null where an output has the input of its number.
    const unsigned* pairs;
    unsigned top_k;
    // First output, the distance of two, and how many there are.
    unsigned first, step, count;

    __device__ __forceinline__ unsigned target(unsigned idx) const { return first + idx * step; }

    __device__ __forceinline__ unsigned source(unsigned idx) const {
        return pairs == nullptr ? target(idx) : pairs[target(idx)] / top_k;
    }
};
