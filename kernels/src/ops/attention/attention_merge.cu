// Joins the sums of splits that were tasks of their own: a block of ROW_THREADS for each row (x) and head (y).

#include "attention.cuh"

// A row whose splits were such tasks: those of head `h` are at `slot + h`, and then every `num_heads` slots.
struct SplitRow {
    unsigned row, slot;
    // That the row sees something of.
    unsigned num_splits;
};

// out: [num_tokens, num_heads, value_dim]
template <class T>
static __device__ void attention_merge(const SplitRow* rows, Partials partials, const float* sinks, T* out,
                                       int num_heads, int value_dim) {
    const SplitRow row = rows[blockIdx.x];
    const unsigned head = blockIdx.y;
    out += (static_cast<size_t>(row.row) * num_heads + head) * value_dim;
    for (int i = threadIdx.x; i < value_dim; i += ROW_THREADS) {
        Sum total = empty_sum();
        float value = 0;
        for (unsigned split = 0; split < row.num_splits; split++) {
            const size_t slot = row.slot + static_cast<size_t>(split) * num_heads + head;
            const Factors factors = join(total, partials.sums[slot]);
            value = join(value, partials.values[slot * value_dim + i], factors);
        }
        out[i] = from_float<T>(value * last_factor(total, sinks, head));
    }
}

#define KERNEL(T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS) attention_merge_##T(                                 \
        const SplitRow* rows, Partials partials, const float* sinks, T* out, int num_heads, int value_dim) {       \
        attention_merge<T>(rows, partials, sinks, out, num_heads, value_dim);                                      \
    }                                                                                                              \
    EXPORT_KERNEL(attention_merge_##T)

KERNEL(float)
KERNEL(bf16)
