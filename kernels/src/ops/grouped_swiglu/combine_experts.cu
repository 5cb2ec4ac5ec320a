// What is done with the rows of experts between their matrices and behind them.

#include "experts.cuh"
#include "glu.cuh"

// What an expert does between its matrices.
struct ExpertActivation {
    // Whether a gate's function lets through the rest of a row; else it is a function of the row.
    unsigned is_gated;
    // As `pointwise.cuh` or `glu.cuh` names it.
    unsigned function;
    float alpha, limit;
};

// A block of ROW_THREADS for each ROW_THREADS of `intermediate` (x), and for as many tiles as there may be (y). It is a
// kernel of its own, and not the end of the product, since a gate and what it lets through are in other panels, of a
// width that is no multiple of 16 in other rows of a panel too; the rows between are few beside the weights.
//
// gate_up: [num_rows, width]; of an expert with a gate, that first and what it lets through `intermediate` behind it.
// activations: of each expert; out: [num_rows, intermediate]
template <class T>
static __device__ void activate_experts(const T* gate_up, const ExpertActivation* activations, const Tile* tiles,
                                        const ExpertTotals* totals, T* out, unsigned width, unsigned intermediate) {
    const unsigned col = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (blockIdx.y >= totals->num_tiles || col >= intermediate) return;
    const Tile tile = tiles[blockIdx.y];
    const ExpertActivation activation = activations[tile.expert];
    for (unsigned row = tile.first; row < tile.end; row++) {
        const T* of_row = gate_up + static_cast<size_t>(row) * width;
        const float first = to_float(of_row[col]);
        float value;
        if (activation.is_gated) {
            const float up = to_float(of_row[col + intermediate]);
            value = gated(activation.function, first, up, activation.alpha, activation.limit);
        } else {
            value = pointwise(static_cast<Pointwise>(activation.function), first);
        }
        out[static_cast<size_t>(row) * intermediate + col] = from_float<T>(value);
    }
}

// One block of ROW_THREADS for each token: the sum of what its experts gave, by their weights, in the order of its
// slots.
//
// y: [num_rows, hidden]; x, out: [num_tokens, hidden]; rows, weights: [num_tokens, top_k]
template <class T>
static __device__ void combine_experts(const T* y, const T* x, const unsigned* rows, const float* weights, T* out,
                                       unsigned hidden, unsigned top_k) {
    const size_t token = blockIdx.x;
    for (unsigned col = threadIdx.x; col < hidden; col += ROW_THREADS) {
        float sum = 0;
        for (unsigned slot = 0; slot < top_k; slot++) {
            const unsigned row = rows[token * top_k + slot];
            if (row == NONE) continue;
            const T value = row == INPUT_ROW ? x[token * hidden + col] : y[static_cast<size_t>(row) * hidden + col];
            // Two roundings, as on the CPU.
            sum = __fadd_rn(sum, __fmul_rn(weights[token * top_k + slot], to_float(value)));
        }
        out[token * hidden + col] = from_float<T>(sum);
    }
}

#define KERNELS(T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                             \
        activate_experts_##T(const T* gate_up, const ExpertActivation* activations, const Tile* tiles,    \
                             const ExpertTotals* totals, T* out, unsigned width, unsigned intermediate) { \
        activate_experts<T>(gate_up, activations, tiles, totals, out, width, intermediate);               \
    }                                                                                                     \
    EXPORT_KERNEL(activate_experts_##T)                                                                   \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                             \
        combine_experts_##T(const T* y, const T* x, const unsigned* rows, const float* weights, T* out,   \
                            unsigned hidden, unsigned top_k) {                                            \
        combine_experts<T>(y, x, rows, weights, out, hidden, top_k);                                      \
    }                                                                                                     \
    EXPORT_KERNEL(combine_experts_##T)

KERNELS(float)
KERNELS(bf16)
