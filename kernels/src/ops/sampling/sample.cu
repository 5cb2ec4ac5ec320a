// One block of VOCAB_THREADS for each row. Nothing is sorted: what top-k and top-p keep, and what is drawn of it, are
// beginnings of an order (by weight, then by token) that are found by the digits of the weight where they end.
//
// Weights have the bits of `ops/boltzmann`, and what min-p and top-k keep is what the CPU keeps. Top-p and the draw
// compare sums in f64, which are added in another order here, the same for every row of a vocabulary: the token is
// another one only where the random number is within such a rounding (some 1e-13 of the whole) of the place between two
// tokens.

#include "sampling.cuh"

struct SampleRow {
    // Among all logits.
    unsigned row;
    // 0 keeps all.
    unsigned top_k;
    // 0 takes the most likely token.
    float temperature;
    float top_p, min_p;
    // Whether `adjust_logits` made the row: it leaves a NaN where the model gave no usable row, and may go past the
    // largest f32.
    unsigned is_adjusted;
    // In [0, 1).
    double uniform;
};

struct alignas(8) Candidate {
    // Bits of a weight above 0 and up to 1, in the order of the weights.
    unsigned weight_bits;
    unsigned token;
};

static __device__ __forceinline__ double weight_of(Candidate candidate) {
    return __uint_as_float(candidate.weight_bits);
}

// Bits of a weight are looked at by the digit, from the first, at 27.
constexpr unsigned DIGIT_BITS = 3, NUM_DIGITS = 1u << DIGIT_BITS, FIRST_SHIFT = 27;
// What a list is cut into on the way to one candidate: a place for each warp's segment, at least.
constexpr unsigned NUM_PIECES = 32;

// What may be drawn of a row. Each warp has the candidates of a segment of the vocabulary, in their order, at the
// beginning of that segment of `all`.
struct Candidates {
    Candidate* all;
    // Tokens of a segment.
    unsigned segment;
    // Of each warp.
    unsigned* counts;
    // NUM_DIGITS for each thread.
    double* bins;
    double* pieces;
    double (&scratch)[VOCAB_WARPS];

    __device__ unsigned warp() const { return threadIdx.x / WARP_SIZE; }
    __device__ unsigned lane() const { return threadIdx.x % WARP_SIZE; }
    __device__ Candidate* own() const { return all + static_cast<size_t>(warp()) * segment; }
};

// Puts the candidate of each lane that has one behind those of the lanes before.
static __device__ __forceinline__ void append(Candidate* list, unsigned& count, Candidate candidate, bool is_one) {
    const unsigned ballot = __ballot_sync(ALL_LANES, is_one), before = (1u << threadIdx.x % WARP_SIZE) - 1;
    if (is_one) list[count + __popc(ballot & before)] = candidate;
    count += __popc(ballot);
}

// Leaves those that `stays` says.
template <class Stays>
static __device__ void keep(const Candidates& row, Stays stays) {
    Candidate* own = row.own();
    const unsigned count = row.counts[row.warp()];
    unsigned num_kept = 0;
    for (unsigned first = 0; first < count; first += WARP_SIZE) {
        const unsigned at = first + row.lane();
        const Candidate candidate = at < count ? own[at] : Candidate{0, 0};
        // What is written from here on lies before what is read next, and over what others read just now.
        __syncwarp();
        append(own, num_kept, candidate, at < count && stays(candidate));
    }
    __syncthreads();
    if (row.lane() == 0) row.counts[row.warp()] = num_kept;
    __syncthreads();
}

// Of what lanes have of a list, in all of them.
template <class Measure>
static __device__ double warp_total(const Candidate* list, unsigned count, Measure measure) {
    double sum = 0;
    for (unsigned at = threadIdx.x % WARP_SIZE; at < count; at += WARP_SIZE) sum += measure(list[at]);
    return warp_sum(sum);
}

template <class Measure>
static __device__ double total_of(const Candidates& row, Measure measure) {
    double sum = 0;
    for (unsigned at = row.lane(); at < row.counts[row.warp()]; at += WARP_SIZE) sum += measure(row.own()[at]);
    return row_sum(sum, row.scratch);
}

// The first piece with which the sum over all pieces up to it reaches far enough; where none does, for another order of
// additions said so before, the last that holds anything. `sum` is that of what is before, and then of what is before
// the piece.
template <class Reaches>
static __device__ unsigned pick(const double* pieces, unsigned count, double& sum, Reaches reaches) {
    unsigned last = 0;
    double before_last = sum;
    for (unsigned i = 0; i < count; i++) {
        if (pieces[i] == 0) continue;
        before_last = sum;
        last = i;
        if (reaches(sum + pieces[i])) break;
        sum += pieces[i];
    }
    sum = before_last;
    return last;
}

// Where the sum reaches far enough in the order of tokens.
template <class Measure, class Reaches>
static __device__ unsigned find_in_order(const Candidates& row, double sum, Measure measure, Reaches reaches) {
    const double own = warp_total(row.own(), row.counts[row.warp()], measure);
    if (row.lane() == 0) row.pieces[row.warp()] = own;
    __syncthreads();
    const unsigned segment = pick(row.pieces, VOCAB_WARPS, sum, reaches);
    const Candidate* list = row.all + static_cast<size_t>(segment) * row.segment;
    unsigned count = row.counts[segment];
    while (count > 1) {
        // All have picked.
        __syncthreads();
        const unsigned size = (count + NUM_PIECES - 1) / NUM_PIECES;
        for (unsigned piece = row.warp(); piece < NUM_PIECES; piece += VOCAB_WARPS) {
            const unsigned first = piece * size < count ? piece * size : count;
            const double sum_of_piece = warp_total(list + first, count - first < size ? count - first : size, measure);
            if (row.lane() == 0) row.pieces[piece] = sum_of_piece;
        }
        __syncthreads();
        const unsigned first = pick(row.pieces, NUM_PIECES, sum, reaches) * size;
        list += first;
        count = count - first < size ? count - first : size;
    }
    const unsigned token = list->token;
    // The list may change from here on.
    __syncthreads();
    return token;
}

// The candidate with which the sum from the heaviest on reaches far enough, of equals the first tokens first.
template <class Measure, class Reaches>
static __device__ Candidate find_by_weight(const Candidates& row, Measure measure, Reaches reaches) {
    const Candidate* own = row.own();
    const unsigned count = row.counts[row.warp()];
    // The digits that are known, and the sum of all that is heavier.
    unsigned known = 0;
    double sum = 0;
    for (int shift = FIRST_SHIFT; shift >= 0; shift -= static_cast<int>(DIGIT_BITS)) {
        for (unsigned digit = 0; digit < NUM_DIGITS; digit++) row.bins[digit * VOCAB_THREADS + threadIdx.x] = 0;
        for (unsigned at = row.lane(); at < count; at += WARP_SIZE) {
            const unsigned digits = own[at].weight_bits >> shift;
            // The heaviest first.
            const unsigned bin = NUM_DIGITS - 1 - digits % NUM_DIGITS;
            if (digits / NUM_DIGITS == known) row.bins[bin * VOCAB_THREADS + threadIdx.x] += measure(own[at]);
        }
        __syncthreads();
        for (unsigned bin = row.warp(); bin < NUM_DIGITS; bin += VOCAB_WARPS) {
            double of_bin = 0;
            for (unsigned thread = row.lane(); thread < VOCAB_THREADS; thread += WARP_SIZE)
                of_bin += row.bins[bin * VOCAB_THREADS + thread];
            of_bin = warp_sum(of_bin);
            if (row.lane() == 0) row.pieces[bin] = of_bin;
        }
        __syncthreads();
        known = known * NUM_DIGITS + (NUM_DIGITS - 1 - pick(row.pieces, NUM_DIGITS, sum, reaches));
    }
    __syncthreads();
    const auto of_equals = [=](Candidate one) { return one.weight_bits == known ? measure(one) : 0.0; };
    return {known, find_in_order(row, sum, of_equals, reaches)};
}

// Leaves the candidates up to the one with which their sum from the heaviest on is no less than wanted.
template <class Measure>
static __device__ void keep_heaviest(const Candidates& row, Measure measure, double wanted) {
    const Candidate last = find_by_weight(row, measure, [=](double sum) { return sum >= wanted; });
    keep(row, [=](Candidate candidate) {
        return candidate.weight_bits > last.weight_bits ||
               (candidate.weight_bits == last.weight_bits && candidate.token <= last.token);
    });
}

// Makes candidates of the tokens that weigh something, where `largest` is the largest logit.
template <class T>
static __device__ void weigh(const T* logits, const Candidates& row, const SampleRow& params, float largest,
                             unsigned vocab_size) {
    // Below this the exponential is only a bound.
    constexpr float LEAST = 1e-37f;
    // The inverse of a number near 0 is infinite, which times 0 is none.
    const float factor = fminf(1.0f / params.temperature, 3.402823466e38f);
    const unsigned first = row.warp() * row.segment, end_of_segment = first + row.segment;
    const unsigned end = end_of_segment < vocab_size ? end_of_segment : vocab_size;
    unsigned count = 0;
    for (unsigned at = first; at < end; at += WARP_SIZE) {
        const unsigned token = at + row.lane();
        float weight = 0;
        if (token < end) {
            const float logit = to_float(logits[token]);
            weight = exponential(__fmul_rn(logit - largest, factor));
            if (largest == INFINITY) weight = logit == largest ? 1.0f : 0.0f;
        }
        const bool is_one = weight >= LEAST && weight >= params.min_p;
        append(row.own(), count, {__float_as_uint(weight), token}, is_one);
    }
    if (row.lane() == 0) row.counts[row.warp()] = count;
    __syncthreads();
}

// logits: [.., vocab_size]; scratch: [number of rows, vocab_size], for those that are drawn; out: [number of rows],
// NONE where a row has no usable number. Penalties and masks come before, by `adjust_logits`; then temperature, min-p,
// top-k, top-p.
template <class T>
static __device__ void sample(const T* logits, const SampleRow& params, Candidate* scratch, unsigned* out,
                              unsigned vocab_size) {
    SHARED(Best, best_scratch, VOCAB_WARPS);
    SHARED(unsigned, counts, VOCAB_WARPS);
    SHARED(double, bins, NUM_DIGITS * VOCAB_THREADS);
    SHARED(double, pieces, NUM_PIECES);
    SHARED(double, sums, VOCAB_WARPS);
    logits += static_cast<size_t>(params.row) * vocab_size;
    Best best = {0, NONE};
    unsigned num_unsound = 0;
    for (unsigned token = threadIdx.x; token < vocab_size; token += VOCAB_THREADS) {
        const float logit = to_float(logits[token]);
        num_unsound += params.is_adjusted ? logit != logit : is_unsound(logit);
        if (logit > -INFINITY) best = better(best, {logit, token});
    }
    num_unsound = row_sum(num_unsound, counts);
    best = row_best(best, best_scratch);
    if (num_unsound != 0 || best.index == NONE || params.temperature == 0) {
        if (threadIdx.x == 0) *out = num_unsound != 0 ? NONE : best.index;
        return;
    }
    // Whole warps' loads, but for the last segment.
    const unsigned segment = (vocab_size + VOCAB_THREADS - 1) / VOCAB_THREADS * WARP_SIZE;
    const Candidates row = {scratch, segment, counts, bins, pieces, sums};
    weigh(logits, row, params, best.value, vocab_size);
    const auto weight = [](Candidate candidate) { return weight_of(candidate); };
    const auto one = [](Candidate) { return 1.0; };
    const double wanted_count = params.top_k;
    if (params.top_k != 0 && total_of(row, one) > wanted_count) keep_heaviest(row, one, wanted_count);
    const bool is_nucleus = params.top_p < 1.0f;
    if (is_nucleus) {
        const double top_p = params.top_p, total = total_of(row, weight);
        // All that are lighter than this weigh less together than what the nucleus leaves out, so it needs none of
        // them.
        const double negligible = (1 - top_p) * total / vocab_size;
        keep(row, [=](Candidate candidate) { return weight_of(candidate) >= negligible; });
        keep_heaviest(row, weight, top_p * total);
    }
    const double target = params.uniform * total_of(row, weight);
    const auto is_past = [=](double sum) { return sum > target; };
    // The order that the CPU has them in.
    const unsigned token =
        is_nucleus ? find_by_weight(row, weight, is_past).token : find_in_order(row, 0, weight, is_past);
    if (threadIdx.x == 0) *out = token;
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(VOCAB_THREADS)                                                        \
        sample_##T(const T* logits, const SampleRow* rows, Candidate* scratch, unsigned* out, unsigned vocab_size) {   \
        sample<T>(logits, rows[blockIdx.x], scratch + static_cast<size_t>(blockIdx.x) * vocab_size, out + blockIdx.x,  \
                  vocab_size);                                                                                         \
    }                                                                                                                  \
    EXPORT_KERNEL(sample_##T)

KERNELS(float)
KERNELS(bf16)
