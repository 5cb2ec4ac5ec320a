// What sampling and log-probabilities share.

#pragma once

#include "device.cuh"

// Threads of a block that has a row of logits: a vocabulary is long, and few rows are in a step.
constexpr int VOCAB_THREADS = 512;
constexpr int VOCAB_WARPS = VOCAB_THREADS / WARP_SIZE;

// e^x as `lanes/math.rs` computes it, to the bit, which the device's own is not: what is drawn depends on it. Clamped
// to -87..=88; a NaN stays one.
static __device__ __forceinline__ float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = rintf(__fmul_rn(x, 1.44269504088896341f));
    // ln 2 in two parts, the first exact in the products.
    float r = __fmaf_rn(n, -0.6933594f, x);
    r = __fmaf_rn(n, 2.1219444e-4f, r);
    float p = 1.9875691e-4f;
    p = __fmaf_rn(p, r, 1.3981999e-3f);
    p = __fmaf_rn(p, r, 8.333452e-3f);
    p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 1.6666665e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fmaf_rn(__fmul_rn(r, r), p, r);
    return (p + 1.0f) * __uint_as_float(static_cast<unsigned>(static_cast<int>(n) + 127) << 23);
}

// Whether no sampling can be made of a row with this logit.
static __device__ __forceinline__ bool is_unsound(float logit) { return !(logit < INFINITY); }
