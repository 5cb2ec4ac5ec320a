// Gates, in f32: those of `ops/glu`.

#pragma once

#include "pointwise.cuh"

// In place of a function of the gate: `g * sigmoid(alpha * g) * (u + 1)`, both clamped.
constexpr unsigned CLAMPED_SWISH = 0xffffffffu;

static __device__ __forceinline__ float gated(unsigned function, float gate, float up, float alpha, float limit) {
    if (function != CLAMPED_SWISH) return pointwise(static_cast<Pointwise>(function), gate) * up;
    const float g = gate > limit ? limit : gate;
    return g * sigmoid(alpha * g) * (clamped(up, -limit, limit) + 1);
}
