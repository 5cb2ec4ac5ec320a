// A thread for each number, in blocks of ROW_THREADS.

#include "glu.cuh"

// gate_up: [num_tokens, 2 * width], out: [num_tokens, width]
template <class T>
static __device__ void glu(const T* gate_up, T* out, int num_tokens, int width, unsigned function, float alpha, float limit) {
    const size_t at = static_cast<size_t>(blockIdx.x) * ROW_THREADS + threadIdx.x;
    if (at >= static_cast<size_t>(num_tokens) * width) return;
    const size_t gate_at = at / width * 2 * width + at % width;
    const float gate = to_float(gate_up[gate_at]), up = to_float(gate_up[gate_at + width]);
    out[at] = from_float<T>(gated(function, gate, up, alpha, limit));
}

#define KERNELS(T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS) glu_##T(const T* gate_up, T* out, int num_tokens,    \
                                                                      int width, unsigned function, float alpha,   \
                                                                      float limit) {                               \
        glu<T>(gate_up, out, num_tokens, width, function, alpha, limit);                                           \
    }                                                                                                              \
    EXPORT_KERNEL(glu_##T)

KERNELS(float)
KERNELS(bf16)
