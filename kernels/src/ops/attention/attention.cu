// Attention of any types and sizes: a block of ROW_THREADS for each task (x) and key-value head (y), a warp for each
// pair.

#include "attention.cuh"

constexpr unsigned PAIRS = ROW_WARPS;
// Positions of a tile: one for each lane.
constexpr unsigned TILE = WARP_SIZE;
// Elements of keys or values that are in shared memory at a time, and where the next position's begin: neither lanes
// that read one element of each position meet in a bank, nor those that read one position.
constexpr unsigned PIECE = 64, PIECE_STRIDE = PIECE + 1;

// Elements `first..first + len` of the rows of the cache at these slots, which another thread may have written just
// now; `len` is at most PIECE.
template <class Cache>
static __device__ void stage(const Cache* cache, size_t width, const unsigned (&slots)[TILE], unsigned first,
                             unsigned len, float (&piece)[TILE * PIECE_STRIDE]) {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < TILE * PIECE; i += ROW_THREADS) {
        const unsigned place = i / PIECE, element = i % PIECE;
        if (element < len && slots[place] != NONE)
            piece[place * PIECE_STRIDE + element] = to_float(cache[slots[place] * width + first + element]);
    }
    __syncthreads();
}

// A warp's pair and its numbers.
struct Row {
    Pair pair;
    // [key_dim], [value_dim], [value_dim], [TILE]
    float *query, *values, *total_values, *weights;
};

template <class T, class Cache>
static __device__ void load_query(const Attention<T, Cache>& op, const Row& row) {
    for (unsigned i = threadIdx.x % WARP_SIZE; i < op.heads.key_dim && row.pair.is_real(); i += WARP_SIZE) {
        const unsigned part = i >= op.query_dims[0], element = i - part * op.query_dims[0];
        const size_t start = row.pair.place(op.heads.num_heads) * op.query_dims[part];
        row.query[i] = to_float(op.queries[part][start + element]);
    }
}

// What this lane's position of a tile gives with the query.
template <class T, class Cache>
static __device__ float multiply_key(const Attention<T, Cache>& op, const Row& row, unsigned first,
                                     const unsigned (&slots)[TILE], float (&piece)[TILE * PIECE_STRIDE]) {
    const unsigned lane = threadIdx.x % WARP_SIZE, start = op.heads.key_start + blockIdx.y * op.heads.key_dim;
    float product = 0;
    for (unsigned done = 0; done < op.heads.key_dim; done += PIECE) {
        const unsigned len = op.heads.key_dim - done < PIECE ? op.heads.key_dim - done : PIECE;
        stage(op.cache, op.batch.width, slots, start + done, len, piece);
        if (!row.pair.visible.holds(first + lane)) continue;
        for (unsigned i = 0; i < len; i++)
            product = __fmaf_rn(row.query[done + i], piece[lane * PIECE_STRIDE + i], product);
    }
    return product;
}

// Turns the product into this lane's weight. Gives what the values so far are multiplied with.
template <class T, class Cache>
static __device__ float weigh(const Attention<T, Cache>& op, const Row& row, unsigned first, float product, Sum& sum) {
    const unsigned lane = threadIdx.x % WARP_SIZE;
    const bool sees = row.pair.visible.holds(first + lane);
    const float score = sees ? score_of(op, row.pair, first + lane, product) : -INFINITY;
    const float of_tile = warp_merge(score, [](float a, float b) { return fmaxf(a, b); });
    const float max = fmaxf(of_tile, sum.max);
    const float weight = sees ? expf(score - max) : 0;
    const float weight_sum = warp_sum(weight);
    const float factor = expf(sum.max - max);
    sum = {max, __fmaf_rn(sum.sum, factor, weight_sum)};
    row.weights[lane] = weight;
    return factor;
}

template <class T, class Cache>
static __device__ void add_values(const Attention<T, Cache>& op, const Row& row, unsigned first, float factor,
                                  const unsigned (&slots)[TILE], float (&piece)[TILE * PIECE_STRIDE]) {
    const Span own = row.pair.visible.within(first, TILE);
    const unsigned start = op.heads.value_start + blockIdx.y * op.heads.value_dim;
    for (unsigned done = 0; done < op.heads.value_dim; done += PIECE) {
        const unsigned len = op.heads.value_dim - done < PIECE ? op.heads.value_dim - done : PIECE;
        stage(op.cache, op.batch.width, slots, start + done, len, piece);
        if (own.is_empty()) continue;
        for (unsigned i = threadIdx.x % WARP_SIZE; i < len; i += WARP_SIZE) {
            float value = row.values[done + i] * factor;
            // Whatever the values of hidden positions are, they do not count.
            for (unsigned place = own.start - first; place < own.end - first; place++)
                value = __fmaf_rn(row.weights[place], piece[place * PIECE_STRIDE + i], value);
            row.values[done + i] = value;
        }
    }
}

// Dynamic memory: `4 * PAIRS * (key_dim + 2 * value_dim)` bytes.
template <class T, class Cache>
static __device__ void attention(const Attention<T, Cache>& op) {
    DYNAMIC_SHARED(float, memory);
    SHARED(float, piece, TILE * PIECE_STRIDE);
    SHARED(unsigned, slots, TILE);
    SHARED(float, weights, PAIRS * TILE);
    const unsigned key_dim = op.heads.key_dim, value_dim = op.heads.value_dim;
    const Task task = op.tasks[blockIdx.x];
    const unsigned warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    float* values = memory + PAIRS * key_dim + warp * value_dim;
    const Row row = {pair_of(op, task, blockIdx.y, task.first_pair + warp), memory + warp * key_dim, values,
                     values + PAIRS * value_dim, weights + warp * TILE};
    const Span all = seen(op, task, PAIRS).by_some;
    load_query(op, row);
    Sum total = empty_sum();
    for (unsigned i = lane; i < value_dim; i += WARP_SIZE) row.total_values[i] = 0;

    for (unsigned split = task.first_split; split < task.end_split; split++) {
        const Span span = all.within(split * SPLIT, SPLIT);
        Sum sum = empty_sum();
        for (unsigned i = lane; i < value_dim; i += WARP_SIZE) row.values[i] = 0;
        for (unsigned first = span.start / TILE * TILE; first < span.end; first += TILE) {
            const unsigned position = first + threadIdx.x;
            if (threadIdx.x < TILE)
                slots[threadIdx.x] = span.holds(position) ? cache_slot(op.batch, task.seq_idx, position) : NONE;
            const float product = multiply_key(op, row, first, slots, piece);
            const bool sees_some = !row.pair.visible.within(first, TILE).is_empty();
            const float factor = sees_some ? weigh(op, row, first, product, sum) : 1;
            add_values(op, row, first, factor, slots, piece);
        }
        if (row.pair.visible.within(split * SPLIT, SPLIT).is_empty()) continue;
        if (task.slot != NONE) {
            const size_t slot = row.pair.slot(task);
            if (lane == 0) op.partials.sums[slot] = sum;
            for (unsigned i = lane; i < value_dim; i += WARP_SIZE)
                op.partials.values[slot * value_dim + i] = row.values[i];
            continue;
        }
        const Factors factors = join(total, sum);
        for (unsigned i = lane; i < value_dim; i += WARP_SIZE)
            row.total_values[i] = join(row.total_values[i], row.values[i], factors);
    }
    if (task.slot != NONE || !row.pair.is_real()) return;
    const float factor = last_factor(total, op.learned.sinks, row.pair.head);
    T* out = op.out + row.pair.place(op.heads.num_heads) * value_dim;
    for (unsigned i = lane; i < value_dim; i += WARP_SIZE) out[i] = from_float<T>(row.total_values[i] * factor);
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
