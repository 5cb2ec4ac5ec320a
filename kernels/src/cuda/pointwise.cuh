// Activations of one number, in f32: those of `ops/pointwise`, in its order.

#pragma once

#include "device.cuh"

enum Pointwise : unsigned {
    RELU,
    GELU,
    GELU_TANH,
    SILU,
    SIGMOID,
    SQUARED_RELU,
    RELU6,
    LEAKY_RELU,
    CLIPPED_GELU,
    QUICK_GELU,
    HARD_SWISH,
    MISH,
    TANH,
    IDENTITY,
};

// Comparisons keep a NaN, which fminf and fmaxf would hide.
static __device__ __forceinline__ float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// By the complement, which has all of its digits where 1 + erf(x) has lost them.
static __device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(-x * 0.70710678118654752f); }

static __device__ __forceinline__ float pointwise(Pointwise function, float x) {
    switch (function) {
        case RELU: return x < 0 ? 0 : x;
        case GELU: return gelu(x);
        // 1 + tanh(y) is 2 sigmoid(2y).
        case GELU_TANH: return x * sigmoid(2 * 0.79788456080286536f * (x + 0.044715f * x * x * x));
        case SILU: return x * sigmoid(x);
        case SIGMOID: return sigmoid(x);
        case SQUARED_RELU: return x < 0 ? 0 : x * x;
        case RELU6: return clamped(x, 0, 6);
        case LEAKY_RELU: return x < 0 ? 0.01f * x : x;
        case CLIPPED_GELU: return clamped(gelu(x), -10, 10);
        case QUICK_GELU: return x * sigmoid(1.702f * x);
        case HARD_SWISH: return x * clamped(x + 3, 0, 6) / 6;
        case MISH: {
            // tanh(ln(1 + e^x)) is n / (n + 2) with n = e^x (e^x + 2), and 1 to all digits far above 0.
            const float e = expf(x), n = e * (e + 2);
            return x > 20 ? x : x * (n / (n + 2));
        }
        case TANH: return tanhf(x);
        case IDENTITY: return x;
    }
    return x;
}
