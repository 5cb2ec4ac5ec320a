// Four kernels, one after the other, for a step's rows of all sequences: the convolution, what it keeps, what the
// recurrence reads of each row beside that, the recurrence. Each sums in one order, which sizes alone determine: cut
// anywhere, a sequence has the same bits. What a kernel hands to the next is f32.
//
// A state lies as `DeltaSpec::state_width` says; no two sequences of a step have the same. key_dim is 256 at most.

#include "pointwise.cuh"

struct Delta {
    unsigned num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel, activation;
};

// As `PagedBatch` has them.
struct Sequences {
    const unsigned *cu_seqlens, *context_lens, *source_lens, *state_slots;
    unsigned num_seqs;
};

// Under the root, so that a zero vector stays one.
constexpr float NORM_EPS = 1e-6f;
// Columns of a state's row are padded to as many.
constexpr unsigned VECTOR = 16;
// Rows that a block convolves, one after the other.
constexpr unsigned CONV_ROWS = 32;
// Columns of a state that a block has, and rows of these that a thread has of its column.
constexpr unsigned COLUMNS = 32, OWN_ROWS = 32;
// Rows whose inputs wait in shared memory.
constexpr unsigned TILE = 8;

struct alignas(16) Four {
    float at[4];
};

static __device__ __forceinline__ size_t num_channels(const Delta& delta) {
    return 2 * delta.num_key_heads * delta.key_dim + delta.num_value_heads * delta.value_dim;
}

static __device__ __forceinline__ size_t conv_width(const Delta& delta) {
    return (delta.conv_kernel - 1) * num_channels(delta);
}

static __device__ __forceinline__ unsigned row_width(const Delta& delta) {
    return (delta.value_dim + VECTOR - 1) / VECTOR * VECTOR;
}

static __device__ __forceinline__ size_t head_width(const Delta& delta) {
    return static_cast<size_t>(delta.key_dim) * row_width(delta);
}

static __device__ __forceinline__ size_t state_start(const Delta& delta, const Sequences& sequences, unsigned seq) {
    return sequences.state_slots[seq] * (conv_width(delta) + delta.num_value_heads * head_width(delta));
}

// Whether a sequence has no state yet: what another one left in its slot counts for nothing.
static __device__ __forceinline__ bool is_first(const Sequences& sequences, unsigned seq) {
    const unsigned num_rows = sequences.cu_seqlens[seq + 1] - sequences.cu_seqlens[seq];
    return sequences.context_lens[seq] - num_rows == sequences.source_lens[seq];
}

// The last sequence that begins at this row or before; those without rows begin where the next one does.
static __device__ unsigned sequence_of(const Sequences& sequences, unsigned row) {
    unsigned first = 0, end = sequences.num_seqs;
    while (end - first > 1) {
        const unsigned middle = first + (end - first) / 2;
        if (sequences.cu_seqlens[middle] <= row) first = middle;
        else end = middle;
    }
    return first;
}

// activation(conv(x)), a thread for each channel in a grid of (channels, CONV_ROWS of all rows). qkv, out: [num_tokens,
// num_channels]; weights: [num_channels, conv_kernel].
template <class T>
static __device__ void convolve(const T* qkv, const float* weights, const float* states, float* out, const Delta& delta,
                                const Sequences& sequences) {
    const size_t width = num_channels(delta), channel = static_cast<size_t>(blockIdx.x) * ROW_THREADS + threadIdx.x;
    if (channel >= width) return;
    const unsigned num_rows = sequences.cu_seqlens[sequences.num_seqs], first_row = blockIdx.y * CONV_ROWS;
    const unsigned end_row = num_rows - first_row < CONV_ROWS ? num_rows : first_row + CONV_ROWS;
    unsigned seq = sequence_of(sequences, first_row);
    for (unsigned row = first_row; row < end_row; row++) {
        while (row >= sequences.cu_seqlens[seq + 1]) seq++;
        const unsigned before = row - sequences.cu_seqlens[seq];
        const float* kept = states + state_start(delta, sequences, seq) + channel;
        const bool has_kept = !is_first(sequences, seq);
        float sum = 0;
        for (unsigned tap = 0; tap < delta.conv_kernel; tap++) {
            const unsigned back = delta.conv_kernel - 1 - tap;
            float input = 0;
            // What is `back` rows before, of this step or, `before` rows on, of those that were kept.
            if (before >= back) input = to_float(qkv[(row - back) * width + channel]);
            else if (has_kept) input = kept[(tap + before) * width];
            sum = __fmaf_rn(weights[channel * delta.conv_kernel + tap], input, sum);
        }
        out[row * width + channel] = pointwise(static_cast<Pointwise>(delta.activation), sum);
    }
}

// Leaves the last inputs of a sequence in its state, oldest first: a thread for each channel in a grid of (channels,
// sequences). After `convolve`, which reads what was there.
template <class T>
static __device__ void keep_inputs(const T* qkv, float* states, const Delta& delta, const Sequences& sequences) {
    const size_t width = num_channels(delta), channel = static_cast<size_t>(blockIdx.x) * ROW_THREADS + threadIdx.x;
    const unsigned seq = blockIdx.y, num_kept = delta.conv_kernel - 1;
    if (channel >= width) return;
    const unsigned end_row = sequences.cu_seqlens[seq + 1], num_rows = end_row - sequences.cu_seqlens[seq];
    const unsigned num_new = num_rows < num_kept ? num_rows : num_kept;
    float* kept = states + state_start(delta, sequences, seq) + channel;
    const bool has_kept = !is_first(sequences, seq);
    // What is read next lies behind what is written.
    for (unsigned i = 0; i < num_kept; i++) {
        float input = 0;
        if (i + num_new >= num_kept) input = to_float(qkv[(end_row - (num_kept - i)) * width + channel]);
        else if (has_kept) input = kept[(i + num_new) * width];
        kept[i * width] = input;
    }
}

// Numbers of a row that `scales` makes.
static __device__ __forceinline__ size_t scales_width(const Delta& delta) {
    return 2 * (delta.num_key_heads + delta.num_value_heads);
}

// Of each row, out: [num_tokens, scales_width]: by what the query of each key head is multiplied, to be of length 1
// over the root of key_dim, and its key, to be of length 1; then how much of each value head's correction is taken, and
// what remains of its state. One block for each row. gates: [num_tokens, 2 * num_value_heads], b of all heads, then a;
// decay: -exp(A_log).
template <class T>
static __device__ void scales(const float* convolved, const T* gates, const float* decay, const float* dt_bias,
                              float* out, const Delta& delta) {
    const size_t row = blockIdx.x;
    convolved += row * num_channels(delta);
    gates += row * 2 * delta.num_value_heads;
    out += row * scales_width(delta);
    const unsigned lane = threadIdx.x % WARP_SIZE;
    for (unsigned head = threadIdx.x / WARP_SIZE; head < 2 * delta.num_key_heads; head += ROW_WARPS) {
        float squares = 0;
        for (unsigned i = lane; i < delta.key_dim; i += WARP_SIZE) {
            const float value = convolved[head * delta.key_dim + i];
            squares = __fmaf_rn(value, value, squares);
        }
        const float scale = 1.0f / sqrtf(warp_sum(squares) + NORM_EPS);
        const bool is_query = head < delta.num_key_heads;
        if (lane == 0) out[head] = is_query ? scale * (1.0f / sqrtf(static_cast<float>(delta.key_dim))) : scale;
    }
    out += 2 * delta.num_key_heads;
    for (unsigned head = threadIdx.x; head < delta.num_value_heads; head += ROW_THREADS) {
        const float a = to_float(gates[delta.num_value_heads + head]) + dt_bias[head];
        // Past 20 the softplus is its argument in f32.
        const float softplus = a > 20.0f ? a : log1pf(expf(a));
        out[head] = sigmoid(to_float(gates[head]));
        out[delta.num_value_heads + head] = expf(decay[head] * softplus);
    }
}

// Of a column's SLICES threads, in all of them.
template <unsigned SLICES>
static __device__ __forceinline__ float sum_of_slices(const float (&parts)[4]) {
    float sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    for (unsigned lanes = 1; lanes < SLICES; lanes *= 2) sum += across(sum, static_cast<int>(lanes));
    return sum;
}

// The recurrence of COLUMNS columns of a value head's state over a sequence's rows: blocks of COLUMNS * SLICES threads
// in a grid of (columns of a row, value heads, sequences). A column's threads have its rows in registers, four in a row
// each, in turn. There may be fewer rows than those have room for: what is not there is zero and stays so.
template <class T, unsigned SLICES>
static __device__ void recur(const float* convolved, const float* scales, float* states, T* out, const Delta& delta,
                             const Sequences& sequences) {
    constexpr unsigned THREADS = COLUMNS * SLICES, MAX_KEY_DIM = OWN_ROWS * SLICES;
    constexpr unsigned FOURS = MAX_KEY_DIM / 4, OWN_FOURS = OWN_ROWS / 4;
    SHARED(Four, queries, TILE * FOURS);
    SHARED(Four, keys, TILE * FOURS);
    SHARED(float, values, TILE * COLUMNS);
    SHARED(float, outputs, TILE * COLUMNS);
    SHARED(float, betas, TILE);
    SHARED(float, decays, TILE);
    const unsigned head = blockIdx.y, seq = blockIdx.z;
    const unsigned key_head = head / (delta.num_value_heads / delta.num_key_heads);
    const unsigned slice = threadIdx.x % SLICES, own = threadIdx.x / SLICES, first_column = blockIdx.x * COLUMNS;
    const unsigned width = row_width(delta), column = first_column + own;
    float* state = states + state_start(delta, sequences, seq) + conv_width(delta) + head * head_width(delta) + column;
    const bool has_state = !is_first(sequences, seq);

    Four rows[OWN_FOURS];
    UNROLL
    for (unsigned i = 0; i < OWN_FOURS; i++)
        for (unsigned n = 0; n < 4; n++) {
            const unsigned row = (i * SLICES + slice) * 4 + n;
            const bool is_there = row < delta.key_dim && column < width && has_state;
            rows[i].at[n] = is_there ? state[row * width] : 0;
        }
    const size_t channels = num_channels(delta);
    const size_t out_width = static_cast<size_t>(delta.num_value_heads) * delta.value_dim;
    const size_t first_value = 2 * delta.num_key_heads * delta.key_dim + head * delta.value_dim;
    const unsigned end_row = sequences.cu_seqlens[seq + 1];
    for (unsigned first_row = sequences.cu_seqlens[seq]; first_row < end_row; first_row += TILE) {
        const unsigned num_rows = end_row - first_row < TILE ? end_row - first_row : TILE;
        for (unsigned i = threadIdx.x; i < num_rows * MAX_KEY_DIM; i += THREADS) {
            const unsigned at = i % MAX_KEY_DIM;
            const size_t row = first_row + i / MAX_KEY_DIM;
            const float* query = convolved + row * channels + key_head * delta.key_dim + at;
            const float* key = query + delta.num_key_heads * delta.key_dim;
            const float* of_row = scales + row * scales_width(delta) + key_head;
            const bool is_there = at < delta.key_dim;
            queries[i / 4].at[i % 4] = is_there ? *query * of_row[0] : 0;
            keys[i / 4].at[i % 4] = is_there ? *key * of_row[delta.num_key_heads] : 0;
        }
        for (unsigned i = threadIdx.x; i < num_rows * COLUMNS; i += THREADS) {
            const unsigned at = first_column + i % COLUMNS;
            const float* row_values = convolved + (first_row + i / COLUMNS) * channels + first_value;
            values[i] = at < delta.value_dim ? row_values[at] : 0;
        }
        if (threadIdx.x < num_rows) {
            const float* gates = scales + (first_row + threadIdx.x) * scales_width(delta) + 2 * delta.num_key_heads;
            betas[threadIdx.x] = gates[head];
            decays[threadIdx.x] = gates[delta.num_value_heads + head];
        }
        __syncthreads();
        for (unsigned row = 0; row < num_rows; row++) {
            const Four* key = keys + row * FOURS + slice;
            const Four* query = queries + row * FOURS + slice;
            const float decay = decays[row];
            float recalled[4] = {}, sums[4] = {};
            UNROLL
            for (unsigned i = 0; i < OWN_FOURS; i++) {
                const Four k = key[i * SLICES];
                for (unsigned n = 0; n < 4; n++) {
                    rows[i].at[n] *= decay;
                    recalled[n] = __fmaf_rn(k.at[n], rows[i].at[n], recalled[n]);
                }
            }
            const float correction = betas[row] * (values[row * COLUMNS + own] - sum_of_slices<SLICES>(recalled));
            UNROLL
            for (unsigned i = 0; i < OWN_FOURS; i++) {
                const Four k = key[i * SLICES], q = query[i * SLICES];
                for (unsigned n = 0; n < 4; n++) {
                    rows[i].at[n] = __fmaf_rn(k.at[n], correction, rows[i].at[n]);
                    sums[n] = __fmaf_rn(q.at[n], rows[i].at[n], sums[n]);
                }
            }
            const float output = sum_of_slices<SLICES>(sums);
            if (slice == 0) outputs[row * COLUMNS + own] = output;
        }
        __syncthreads();
        for (unsigned i = threadIdx.x; i < num_rows * COLUMNS; i += THREADS) {
            const unsigned at = first_column + i % COLUMNS;
            if (at >= delta.value_dim) continue;
            out[(first_row + i / COLUMNS) * out_width + head * delta.value_dim + at] = from_float<T>(outputs[i]);
        }
    }
    UNROLL
    for (unsigned i = 0; i < OWN_FOURS; i++)
        for (unsigned n = 0; n < 4; n++) {
            const unsigned row = (i * SLICES + slice) * 4 + n;
            if (row < delta.key_dim && column < width) state[row * width] = rows[i].at[n];
        }
}

#define RECURRENCE(T, MAX_KEY_DIM)                                                                                     \
    extern "C" __global__ void __launch_bounds__(MAX_KEY_DIM / OWN_ROWS * COLUMNS)                                     \
        gated_delta_##MAX_KEY_DIM##_##T(const float* convolved, const float* scales, float* states, T* out,            \
                                        Delta delta, Sequences sequences) {                                            \
        recur<T, MAX_KEY_DIM / OWN_ROWS>(convolved, scales, states, out, delta, sequences);                            \
    }                                                                                                                  \
    EXPORT_KERNEL(gated_delta_##MAX_KEY_DIM##_##T)

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                          \
        gated_delta_convolve_##T(const T* qkv, const float* weights, const float* states, float* out, Delta delta,     \
                                 Sequences sequences) {                                                                \
        convolve<T>(qkv, weights, states, out, delta, sequences);                                                      \
    }                                                                                                                  \
    EXPORT_KERNEL(gated_delta_convolve_##T)                                                                            \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                          \
        gated_delta_keep_inputs_##T(const T* qkv, float* states, Delta delta, Sequences sequences) {                   \
        keep_inputs<T>(qkv, states, delta, sequences);                                                                 \
    }                                                                                                                  \
    EXPORT_KERNEL(gated_delta_keep_inputs_##T)                                                                         \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                          \
        gated_delta_scales_##T(const float* convolved, const T* gates, const float* decay, const float* dt_bias,       \
                               float* out, Delta delta) {                                                              \
        scales<T>(convolved, gates, decay, dt_bias, out, delta);                                                       \
    }                                                                                                                  \
    EXPORT_KERNEL(gated_delta_scales_##T)                                                                              \
    RECURRENCE(T, 128)                                                                                                 \
    RECURRENCE(T, 256)

KERNELS(float)
KERNELS(bf16)
