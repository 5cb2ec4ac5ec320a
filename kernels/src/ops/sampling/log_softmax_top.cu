// One block of VOCAB_THREADS for each row whose log-probabilities were asked for.

#include "sampling.cuh"

struct LogprobRow {
    // Among all logits.
    unsigned row;
    // Most likely tokens that are told.
    unsigned num_top;
};

// A larger number for what comes first: by the logit, in IEEE's total order, and of equals by the token.
static __device__ __forceinline__ unsigned long long rank_of(float logit, unsigned token) {
    const unsigned bits = __float_as_uint(logit);
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - token);
}

// logits: [.., vocab_size], as the model gave them; tokens, logprobs: [num_rows], a token that is NONE has NaN;
// top_tokens, top_logprobs: [num_rows, max_top], best first, no more of a row than it wants and the vocabulary has.
template <class T>
static __device__ void log_softmax_top(const T* logits, const LogprobRow& own, unsigned token, float* logprob,
                                       unsigned* top_tokens, float* top_logprobs, unsigned vocab_size) {
    SHARED(float, maxima, VOCAB_WARPS);
    SHARED(double, sums, VOCAB_WARPS);
    SHARED(unsigned long long, ranks, VOCAB_WARPS);
    logits += static_cast<size_t>(own.row) * vocab_size;
    float largest = -INFINITY;
    for (unsigned i = threadIdx.x; i < vocab_size; i += VOCAB_THREADS) largest = fmaxf(largest, to_float(logits[i]));
    largest = row_max(largest, maxima);
    double sum = 0;
    for (unsigned i = threadIdx.x; i < vocab_size; i += VOCAB_THREADS)
        sum += exponential(to_float(logits[i]) - largest);
    const double log_sum = largest + log(row_sum(sum, sums));
    if (threadIdx.x == 0)
        *logprob = token == NONE ? NAN : static_cast<float>(static_cast<double>(to_float(logits[token])) - log_sum);
    // Each time the best of those that come after the last one.
    unsigned long long last = ~0ull;
    for (unsigned place = 0; place < own.num_top && place < vocab_size; place++) {
        unsigned long long best = 0;
        for (unsigned i = threadIdx.x; i < vocab_size; i += VOCAB_THREADS) {
            const unsigned long long rank = rank_of(to_float(logits[i]), i);
            if (rank < last && rank > best) best = rank;
        }
        last = row_merge(best, ranks, [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });
        const unsigned best_token = 0xffffffffu - static_cast<unsigned>(last);
        if (threadIdx.x == 0) {
            top_tokens[place] = best_token;
            top_logprobs[place] = static_cast<float>(static_cast<double>(to_float(logits[best_token])) - log_sum);
        }
    }
}

#define KERNELS(T)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(VOCAB_THREADS)                                                      \
        log_softmax_top_##T(const T* logits, const LogprobRow* rows, const unsigned* tokens, float* logprobs,        \
                            unsigned* top_tokens, float* top_logprobs, unsigned vocab_size, unsigned max_top) {      \
        const size_t first = static_cast<size_t>(blockIdx.x) * max_top;                                              \
        log_softmax_top<T>(logits, rows[blockIdx.x], tokens[blockIdx.x], logprobs + blockIdx.x, top_tokens + first,  \
                           top_logprobs + first, vocab_size);                                                        \
    }                                                                                                                \
    EXPORT_KERNEL(log_softmax_top_##T)

KERNELS(float)
KERNELS(bf16)
