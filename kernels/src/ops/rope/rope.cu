// One block of ROW_THREADS for each token.

#include "device.cuh"

// x, out: [num_tokens, num_heads, head_dim]; cos, sin: [max_positions, rotary_dim / 2]; positions: [num_tokens], all in the
// table. The elements of a pair lie next to each other, or half of rotary_dim apart.
template <class T>
static __device__ void rope(const T* x, const float* cos, const float* sin, const unsigned* positions, T* out, int num_heads,
                            int head_dim, int rotary_dim, int in_pairs) {
    const int half = rotary_dim / 2, passed = head_dim - rotary_dim;
    const size_t row = static_cast<size_t>(blockIdx.x) * num_heads * head_dim;
    const size_t angles = static_cast<size_t>(positions[blockIdx.x]) * half;
    for (int i = threadIdx.x; i < num_heads * half; i += ROW_THREADS) {
        const size_t head = row + static_cast<size_t>(i / half) * head_dim;
        const int pair = i % half;
        const size_t first = head + (in_pairs ? 2 * pair : pair), second = in_pairs ? first + 1 : first + half;
        const float a = to_float(x[first]), b = to_float(x[second]);
        const float c = cos[angles + pair], s = sin[angles + pair];
        out[first] = from_float<T>(a * c - b * s);
        out[second] = from_float<T>(b * c + a * s);
    }
    for (int i = threadIdx.x; i < num_heads * passed; i += ROW_THREADS) {
        const size_t at = row + static_cast<size_t>(i / passed) * head_dim + rotary_dim + i % passed;
        out[at] = x[at];
    }
}

#define KERNELS(T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                           \
        rope_##T(const T* x, const float* cos, const float* sin, const unsigned* positions, T* out, int num_heads,      \
                 int head_dim, int rotary_dim, int in_pairs) {                                                          \
        rope<T>(x, cos, sin, positions, out, num_heads, head_dim, rotary_dim, in_pairs);                                \
    }                                                                                                                   \
    EXPORT_KERNEL(rope_##T)

KERNELS(float)
KERNELS(bf16)
