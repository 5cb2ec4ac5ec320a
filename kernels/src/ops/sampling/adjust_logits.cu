// One block of VOCAB_THREADS for each row that is to be adjusted.

#include "sampling.cuh"

// Which parts of the lists are a row's.
struct Adjustment {
    // Among all logits.
    unsigned row;
    // Among all masks; NONE allows every token.
    unsigned mask;
    unsigned first_bias, num_biases;
    unsigned first_forbidden, num_forbidden;
    unsigned first_seen, num_seen;
    float repetition_penalty, frequency_penalty, presence_penalty;
};

// Tokens that are not in the vocabulary count for nothing. A row names a token once among its biases, and once among
// what it has seen.
struct AdjustmentLists {
    const unsigned* bias_tokens;
    const float* biases;
    const unsigned* forbidden;
    // Tokens of prompt and output, and how often each is in the output.
    const unsigned *seen, *output_counts;
    // [num_masks, vocab_size / 32, rounded up]: a bit of an allowed token is set, the lowest is the first one's.
    const unsigned* masks;
};

// logits: [.., vocab_size]; out: [number of adjustments, vocab_size], which may be the logits where rows stay in their
// places. Bias, forbidden tokens and penalties, in the order and with the roundings of `cpu.rs`; before them the
// mask of allowed tokens, which structured output will need and which the CPU does not have yet. A row that is unsound
// before becomes one with a NaN.
template <class T>
static __device__ void adjust_logits(const T* logits, float* out, const Adjustment& own, const AdjustmentLists& lists,
                                     unsigned vocab_size) {
    SHARED(unsigned, scratch, VOCAB_WARPS);
    logits += static_cast<size_t>(own.row) * vocab_size;
    out += static_cast<size_t>(blockIdx.x) * vocab_size;
    const size_t first_word = static_cast<size_t>(own.mask) * ((vocab_size + 31) / 32);
    unsigned num_unsound = 0;
    for (unsigned token = threadIdx.x; token < vocab_size; token += VOCAB_THREADS) {
        const float logit = to_float(logits[token]);
        num_unsound += is_unsound(logit);
        const bool is_allowed = own.mask == NONE || (lists.masks[first_word + token / 32] >> token % 32 & 1);
        out[token] = is_allowed ? logit : -INFINITY;
    }
    // Its barriers are those of what was written, too.
    num_unsound = row_sum(num_unsound, scratch);
    for (unsigned i = threadIdx.x; i < own.num_biases; i += VOCAB_THREADS) {
        const unsigned token = lists.bias_tokens[own.first_bias + i];
        if (token < vocab_size) out[token] += lists.biases[own.first_bias + i];
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < own.num_forbidden; i += VOCAB_THREADS) {
        const unsigned token = lists.forbidden[own.first_forbidden + i];
        if (token < vocab_size) out[token] = -INFINITY;
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < own.num_seen; i += VOCAB_THREADS) {
        const unsigned token = lists.seen[own.first_seen + i], count = lists.output_counts[own.first_seen + i];
        if (token >= vocab_size) continue;
        float logit = out[token];
        logit = logit > 0 ? logit / own.repetition_penalty : __fmul_rn(logit, own.repetition_penalty);
        if (count > 0) logit -= __fmul_rn(own.frequency_penalty, static_cast<float>(count)) + own.presence_penalty;
        out[token] = logit;
    }
    __syncthreads();
    if (threadIdx.x == 0 && num_unsound != 0) out[0] = NAN;
}

#define KERNELS(T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(VOCAB_THREADS)                                               \
        adjust_logits_##T(const T* logits, float* out, const Adjustment* adjustments, AdjustmentLists lists,  \
                          unsigned vocab_size) {                                                              \
        adjust_logits<T>(logits, out, adjustments[blockIdx.x], lists, vocab_size);                            \
    }                                                                                                         \
    EXPORT_KERNEL(adjust_logits_##T)

KERNELS(float)
KERNELS(bf16)
