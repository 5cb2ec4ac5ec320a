// One block of ROW_THREADS for each token.

#include "device.cuh"

// As `ops/route` names them.
enum Scoring : unsigned { SOFTMAX, SOFTMAX_TOP_K, SIGMOID, SPARSE_MIXER };
enum GroupScore : unsigned { MAX, TOP_TWO_SUM };

struct Router {
    unsigned num_experts, top_k, scoring;
    float jitter;
    // 0 is none.
    unsigned num_groups, top_groups, group_score;
    // Choice score of the experts of other groups.
    float masked;
    unsigned renormalizes;
    // Added to the sum that weights are divided by.
    float eps;
    // Weights are divided by no less.
    float min_sum;
    float scale;
};

// A NaN is chosen only where nothing else is left, as minus infinity.
static __device__ __forceinline__ float rank_of(float score) { return score != score ? -INFINITY : score; }

// The highest of `choice` that is not taken, of equals the first, in all threads.
static __device__ unsigned best_left(const float* choice, const unsigned char* taken, unsigned len, Best (&scratch)[ROW_WARPS]) {
    Best best = {0, NONE};
    for (unsigned i = threadIdx.x; i < len; i += ROW_THREADS)
        if (!taken[i]) best = better(best, {rank_of(choice[i]), i});
    return row_best(best, scratch).index;
}

// What a group of neighbouring experts is worth.
static __device__ float group_score(const float* choice, unsigned size, unsigned kind) {
    Best first = {0, NONE}, second = {0, NONE};
    for (unsigned i = 0; i < size; i++) {
        const Best one = {rank_of(choice[i]), i};
        if (better(first, one).index == i) {
            second = first;
            first = one;
        } else {
            second = better(second, one);
        }
    }
    if (kind == MAX || second.index == NONE) return choice[first.index];
    return choice[first.index] + choice[second.index];
}

// Leaves the best groups in the choice. The first threads have a group each; at most ROW_THREADS.
static __device__ void mask_groups(float* choice, const Router& router, float (&worth)[ROW_THREADS]) {
    const unsigned size = router.num_experts / router.num_groups;
    if (threadIdx.x < router.num_groups) worth[threadIdx.x] = group_score(choice + threadIdx.x * size, size, router.group_score);
    __syncthreads();
    bool stays = false;
    if (threadIdx.x < router.num_groups) {
        // Its place among all: how many are chosen before it.
        unsigned before = 0;
        const Best own = {rank_of(worth[threadIdx.x]), threadIdx.x};
        for (unsigned group = 0; group < router.num_groups; group++)
            before += group != threadIdx.x && better(own, {rank_of(worth[group]), group}).index == group;
        stays = before < router.top_groups;
    }
    if (threadIdx.x < router.num_groups && !stays)
        for (unsigned i = 0; i < size; i++) choice[threadIdx.x * size + i] = router.masked;
    __syncthreads();
}

// logits: [num_tokens, num_experts]; bias: [num_experts] or null; experts, weights: [num_tokens, top_k], best first. Dynamic
// memory: 9 bytes for each expert.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    route(const float* logits, const float* bias, unsigned* experts, float* weights, Router router) {
    DYNAMIC_SHARED(float, scores);
    SHARED(float, scratch, ROW_WARPS);
    SHARED(float, worth, ROW_THREADS);
    SHARED(Best, best, ROW_WARPS);
    float* choice = scores + router.num_experts;
    unsigned char* taken = reinterpret_cast<unsigned char*>(choice + router.num_experts);
    const float* row = logits + static_cast<size_t>(blockIdx.x) * router.num_experts;
    experts += static_cast<size_t>(blockIdx.x) * router.top_k;
    weights += static_cast<size_t>(blockIdx.x) * router.top_k;

    float largest = -INFINITY, sum = 1;
    if (router.scoring == SOFTMAX) {
        for (unsigned i = threadIdx.x; i < router.num_experts; i += ROW_THREADS) largest = fmaxf(largest, row[i]);
        largest = row_max(largest, scratch);
        sum = 0;
        for (unsigned i = threadIdx.x; i < router.num_experts; i += ROW_THREADS) sum += expf(row[i] - largest);
        sum = row_sum(sum, scratch);
    }
    for (unsigned i = threadIdx.x; i < router.num_experts; i += ROW_THREADS) {
        const float logit = row[i];
        float score = logit;
        if (router.scoring == SOFTMAX) score = expf(logit - largest) / sum;
        if (router.scoring == SIGMOID) score = 1.0f / (1.0f + expf(-logit));
        scores[i] = score;
        choice[i] = bias == nullptr ? score : score + bias[i];
        taken[i] = 0;
    }
    __syncthreads();
    if (router.num_groups != 0) mask_groups(choice, router, worth);
    for (unsigned slot = 0; slot < router.top_k; slot++) {
        const unsigned expert = best_left(choice, taken, router.num_experts, best);
        float weight = scores[expert];
        if (router.scoring == SPARSE_MIXER) {
            // Its softmax among those that are left and near it.
            const float logit = scores[expert];
            float near = 0;
            for (unsigned i = threadIdx.x; i < router.num_experts; i += ROW_THREADS) {
                const bool is_near = (logit - row[i]) / fmaxf(fabsf(row[i]), logit) <= 2 * router.jitter;
                if (!taken[i] && is_near) near += expf(row[i] - logit);
            }
            weight = 1.0f / row_sum(near, scratch);
        }
        if (threadIdx.x == 0) {
            experts[slot] = expert;
            weights[slot] = weight;
            taken[expert] = 1;
        }
        __syncthreads();
    }
    // A handful, in their order.
    if (threadIdx.x != 0) return;
    if (router.scoring == SOFTMAX_TOP_K) {
        float most = -INFINITY, total = 0;
        for (unsigned slot = 0; slot < router.top_k; slot++) most = fmaxf(most, weights[slot]);
        for (unsigned slot = 0; slot < router.top_k; slot++) total += expf(weights[slot] - most);
        for (unsigned slot = 0; slot < router.top_k; slot++) weights[slot] = expf(weights[slot] - most) / total;
    }
    float divisor = 1;
    if (router.renormalizes) {
        divisor = 0;
        for (unsigned slot = 0; slot < router.top_k; slot++) divisor += weights[slot];
        divisor += router.eps;
    }
    if (divisor < router.min_sum) divisor = router.min_sum;
    for (unsigned slot = 0; slot < router.top_k; slot++) weights[slot] = weights[slot] / divisor * router.scale;
}
EXPORT_KERNEL(route)
