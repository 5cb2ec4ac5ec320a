// Attention of any types and sizes: a block of ROW_THREADS for each task and key-value head, a warp of it for each pair.

#include "attention.cuh"

constexpr unsigned PAIRS = ROW_WARPS;
// Positions of a tile: one for each lane.
constexpr unsigned TILE = WARP_SIZE;
// Elements of keys or values that are in shared memory at a time, and where the next position's begin: lanes that read one element
// of each position, and such that read one position, meet in no bank.
constexpr unsigned PIECE = 64, PIECE_STRIDE = PIECE + 1;

// Elements `first..first + len` of the rows of the cache at these slots; `len` is at most PIECE. What was written before is seen by all
// threads, which have read the last piece.
template <class Cache>
static __device__ void stage(const Cache* cache, size_t width, const unsigned (&slots)[TILE], unsigned first, unsigned len,
                             float (&piece)[TILE * PIECE_STRIDE]) {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < TILE * PIECE; i += ROW_THREADS) {
        const unsigned place = i / PIECE, element = i % PIECE;
        if (element < len && slots[place] != NONE)
            piece[place * PIECE_STRIDE + element] = to_float(cache[slots[place] * width + first + element]);
    }
    __syncthreads();
}

// Dynamic memory: `4 * PAIRS * (key_dim + 2 * value_dim)` bytes.
template <class T, class Cache>
static __device__ void attention(const Attention<T, Cache>& op) {
    DYNAMIC_SHARED(float, memory);
    SHARED(float, piece, TILE * PIECE_STRIDE);
    SHARED(unsigned, slots, TILE);
    SHARED(float, all_weights, PAIRS * TILE);
    const Heads heads = op.heads;
    const Task task = op.tasks[blockIdx.x];
    const unsigned kv_head = blockIdx.y, warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const Pair pair = pair_of(op, task, kv_head, task.first_pair + warp);
    const Span block_span = seen(op, task, PAIRS).by_some;
    float* query = memory + warp * heads.key_dim;
    float* values = memory + PAIRS * heads.key_dim + warp * heads.value_dim;
    float* total_values = values + PAIRS * heads.value_dim;
    float* weights = all_weights + warp * TILE;

    for (unsigned i = lane; i < heads.key_dim && pair.is_real(); i += WARP_SIZE) {
        const unsigned part = i >= op.query_dims[0], element = i - part * op.query_dims[0];
        query[i] = to_float(op.queries[part][pair.place(heads.num_heads) * op.query_dims[part] + element]);
    }
    Sum total = empty_sum();
    for (unsigned i = lane; i < heads.value_dim; i += WARP_SIZE) total_values[i] = 0;

    for (unsigned split = task.first_split; split < task.end_split; split++) {
        const Span split_span = block_span.within(split * SPLIT, SPLIT);
        Sum sum = empty_sum();
        for (unsigned i = lane; i < heads.value_dim; i += WARP_SIZE) values[i] = 0;
        for (unsigned first = split_span.start / TILE * TILE; first < split_span.end; first += TILE) {
            const Span own = pair.visible.within(first, TILE);
            if (threadIdx.x < TILE) {
                const unsigned position = first + threadIdx.x;
                slots[threadIdx.x] = split_span.holds(position) ? cache_slot(op.batch, task.seq_idx, position) : NONE;
            }
            float product = 0;
            for (unsigned done = 0; done < heads.key_dim; done += PIECE) {
                const unsigned len = heads.key_dim - done < PIECE ? heads.key_dim - done : PIECE;
                stage(op.cache, op.batch.width, slots, heads.key_start + kv_head * heads.key_dim + done, len, piece);
                if (own.holds(first + lane))
                    for (unsigned i = 0; i < len; i++) product = __fmaf_rn(query[done + i], piece[lane * PIECE_STRIDE + i], product);
            }
            float factor = 1;
            if (!own.is_empty()) {
                const bool sees = own.holds(first + lane);
                const float score = sees ? score_of(op, pair, first + lane, product) : -INFINITY;
                float max = score;
                for (int lanes = WARP_SIZE / 2; lanes > 0; lanes /= 2) max = fmaxf(max, across(max, lanes));
                max = fmaxf(max, sum.max);
                const float weight = sees ? expf(score - max) : 0;
                float weight_sum = weight;
                for (int lanes = WARP_SIZE / 2; lanes > 0; lanes /= 2) weight_sum += across(weight_sum, lanes);
                factor = expf(sum.max - max);
                sum = {max, __fmaf_rn(sum.sum, factor, weight_sum)};
                weights[lane] = weight;
            }
            for (unsigned done = 0; done < heads.value_dim; done += PIECE) {
                const unsigned len = heads.value_dim - done < PIECE ? heads.value_dim - done : PIECE;
                stage(op.cache, op.batch.width, slots, heads.value_start + kv_head * heads.value_dim + done, len, piece);
                if (own.is_empty()) continue;
                for (unsigned i = lane; i < len; i += WARP_SIZE) {
                    float value = values[done + i] * factor;
                    // Whatever the values of hidden positions are, they do not count.
                    for (unsigned place = own.start - first; place < own.end - first; place++)
                        value = __fmaf_rn(weights[place], piece[place * PIECE_STRIDE + i], value);
                    values[done + i] = value;
                }
            }
        }
        if (pair.visible.within(split * SPLIT, SPLIT).is_empty()) continue;
        if (task.slot != NONE) {
            const size_t slot = pair.slot(task);
            if (lane == 0) op.partials.sums[slot] = sum;
            for (unsigned i = lane; i < heads.value_dim; i += WARP_SIZE) op.partials.values[slot * heads.value_dim + i] = values[i];
            continue;
        }
        const Factors factors = join(total, sum);
        for (unsigned i = lane; i < heads.value_dim; i += WARP_SIZE) total_values[i] = join(total_values[i], values[i], factors);
    }
    if (task.slot != NONE || !pair.is_real()) return;
    const float factor = last_factor(total, op.learned.sinks, pair.head);
    T* out = op.out + pair.place(heads.num_heads) * heads.value_dim;
    for (unsigned i = lane; i < heads.value_dim; i += WARP_SIZE) out[i] = from_float<T>(total_values[i] * factor);
}

#define KERNEL(T, Cache)                                                   \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)              \
        attention_##T##_##Cache(Attention<T, Cache> op) {                  \
        attention<T, Cache>(op);                                           \
    }                                                                      \
    EXPORT_KERNEL(attention_##T##_##Cache)

KERNEL(float, float)
KERNEL(float, bf16)
KERNEL(bf16, float)
KERNEL(bf16, bf16)
