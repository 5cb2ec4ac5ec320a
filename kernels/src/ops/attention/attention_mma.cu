// Attention on tensor cores, of bf16 over a cache of bf16: a block for each task (x) and key-value head (y).
//
// All sizes and places of `Heads`, the width of the cache and the `query_dims` are multiples of 8; queries and cache
// begin at multiples of 16 bytes, the output at one of 4. As in FlashAttention, a weight is rounded to bf16 before it
// meets its value, and the sum of weights is of what they were before.
//
// A tile goes through four stages with a barrier after each: its keys arrive; scores are computed, while the values
// arrive; the softmax turns scores into weights in their place, while the next keys arrive; weighted values are
// added. Warps share scores by rows and keys, values by columns. A pair's numbers are the same in all kernels of one
// TILE.

#include "attention.cuh"
#include "mma.cuh"

// Threads that turn the scores of a pair into weights.
constexpr int PAIR_THREADS = 4;

template <unsigned PAIRS_, unsigned WARPS_, unsigned TILE_, unsigned VALUE_DIM>
struct Sizes {
    static constexpr unsigned PAIRS = PAIRS_, WARPS = WARPS_, THREADS = WARPS * WARP_SIZE;
    // Positions of a tile.
    static constexpr unsigned TILE = TILE_;
    // Tiles of a product have 16 rows and 8 columns.
    static constexpr unsigned ROW_TILES = PAIRS / 16, WARPS_OF_ROWS = WARPS / ROW_TILES;
    static constexpr unsigned KEY_TILES = TILE / 8 / WARPS_OF_ROWS;
    // Of a warp at most.
    static constexpr unsigned VALUE_TILES = VALUE_DIM / 8 / WARPS;
    // 16 bytes more than a whole number of 32: what a product takes of 8 rows together is in different banks.
    static constexpr unsigned SCORE_STRIDE = TILE + 4, WEIGHT_STRIDE = 2 * SCORE_STRIDE;
    static constexpr unsigned WEIGHTS = TILE / PAIR_THREADS;
};

// A thread's part of the weighted values: its fragments of each tile of rows and columns.
template <class S>
struct Values {
    float of[S::ROW_TILES][S::VALUE_TILES][4];
};

// What a block works on, and where. Dynamic memory is `2 * ((PAIRS + TILE) * stride_of(key_dim) + TILE *
// stride_of(value_dim)) + 4 * PAIRS * (TILE + 4)` bytes, without those of the value_dim if the values are keys.
template <class S>
struct Block {
    const Attention<bf16, bf16>& op;
    Task task;
    Seen seen;
    // Whether there is one key-value head, whose value is part of its key.
    bool values_are_keys;
    unsigned key_stride, value_stride;
    // [PAIRS, key_stride], [TILE, key_stride], [TILE, value_stride]
    bf16 *queries, *keys, *values;
    // [PAIRS, SCORE_STRIDE]; weights lie in the first half of each row.
    float* scores;
    // [SPLIT]: those of a split's positions in the cache, NONE where no pair sees them.
    unsigned* slots;
    // [PAIRS]
    Span* visible;
    // [PAIRS]: what the values so far are multiplied with.
    float* factors;
    // Whether values of the tile are infinite or NaN.
    unsigned* has_non_finite;
    // The pair whose scores this thread turns into weights, if it has one.
    Pair pair;
    bool has_pair, is_first_of_pair;

    __device__ __forceinline__ bf16* weights(unsigned row) const {
        return reinterpret_cast<bf16*>(scores) + row * S::WEIGHT_STRIDE;
    }

    // First elements of the head in a row of the cache.
    __device__ __forceinline__ unsigned key_start() const { return op.heads.key_start + blockIdx.y * op.heads.key_dim; }
    __device__ __forceinline__ unsigned value_start() const {
        return op.heads.value_start + blockIdx.y * op.heads.value_dim;
    }
};

// What rows take of whole steps of a product.
static __device__ __forceinline__ unsigned padded(unsigned dim) { return (dim + 15) / 16 * 16; }
// And 16 bytes more, as scores have them.
static __device__ __forceinline__ unsigned stride_of(unsigned dim) { return padded(dim) + 8; }

template <class S>
static __device__ __forceinline__ Block<S> block_of(const Attention<bf16, bf16>& op) {
    DYNAMIC_SHARED(bf16, memory);
    SHARED(unsigned, slots, SPLIT);
    SHARED(Span, visible, S::PAIRS);
    SHARED(float, factors, S::PAIRS);
    SHARED(unsigned, has_non_finite, 1);
    const Heads& heads = op.heads;
    const unsigned key_end = heads.key_start + heads.key_dim, value_end = heads.value_start + heads.value_dim;
    const bool is_within = heads.key_start <= heads.value_start && value_end <= key_end;
    const bool values_are_keys = heads.group_size == heads.num_heads && is_within;
    const unsigned key_stride = stride_of(heads.key_dim);
    const unsigned value_stride = values_are_keys ? key_stride : stride_of(heads.value_dim);
    bf16* keys = memory + S::PAIRS * key_stride;
    bf16* behind_keys = keys + S::TILE * key_stride;
    bf16* values = values_are_keys ? keys + heads.value_start - heads.key_start : behind_keys;
    bf16* scores = values_are_keys ? behind_keys : behind_keys + S::TILE * value_stride;
    const Task task = op.tasks[blockIdx.x];
    const unsigned own_row = threadIdx.x / PAIR_THREADS;
    const Pair pair = pair_of(op, task, blockIdx.y, task.first_pair + own_row);
    return {op, task, seen(op, task, S::PAIRS), values_are_keys, key_stride, value_stride, memory, keys, values,
            reinterpret_cast<float*>(scores), slots, visible, factors, has_non_finite, pair, own_row < S::PAIRS,
            own_row < S::PAIRS && threadIdx.x % PAIR_THREADS == 0};
}

// Asks for elements `first..first + dim` of the rows of the cache at a tile's slots; zeros where there is none.
template <class S>
static __device__ __forceinline__ void copy_rows(const Block<S>& block, unsigned tile, unsigned first, unsigned dim,
                                                 bf16* target, unsigned stride) {
    const unsigned num_pieces = dim / 8, *slots = block.slots + tile % SPLIT;
    for (unsigned i = threadIdx.x; i < S::TILE * num_pieces; i += S::THREADS) {
        const unsigned row = i / num_pieces, element = i % num_pieces * 8, slot = slots[row];
        const size_t start = slot == NONE ? 0 : static_cast<size_t>(slot) * block.op.batch.width + first + element;
        cp_async(target + row * stride + element, block.op.cache + start, slot != NONE);
    }
}

template <class S>
static __device__ __forceinline__ void copy_keys(const Block<S>& block, unsigned tile) {
    copy_rows(block, tile, block.key_start(), block.op.heads.key_dim, block.keys, block.key_stride);
}

template <class S>
static __device__ __forceinline__ void copy_values(const Block<S>& block, unsigned tile) {
    copy_rows(block, tile, block.value_start(), block.op.heads.value_dim, block.values, block.value_stride);
}

// Asks for the queries, with zeros behind their ends, where the keys have them too, and for pairs that there are not.
template <class S>
static __device__ __forceinline__ void copy_queries(const Block<S>& block) {
    const Attention<bf16, bf16>& op = block.op;
    const unsigned dim = op.heads.key_dim, num_pieces = padded(dim) / 8;
    for (unsigned i = threadIdx.x; i < S::PAIRS * num_pieces; i += S::THREADS) {
        const unsigned row = i / num_pieces, element = i % num_pieces * 8;
        const Pair pair = pair_of(op, block.task, blockIdx.y, block.task.first_pair + row);
        const bool is_there = pair.is_real() && element < dim;
        const unsigned part = is_there && element >= op.query_dims[0], in_part = element - part * op.query_dims[0];
        const size_t start = is_there ? pair.place(op.heads.num_heads) * op.query_dims[part] + in_part : 0;
        cp_async(block.queries + row * block.key_stride + element, op.queries[part] + start, is_there);
    }
    for (unsigned row = threadIdx.x; row < S::TILE && padded(dim) != dim; row += S::THREADS)
        cp_async(block.keys + row * block.key_stride + dim, op.cache, false);
}

template <class S>
static __device__ __forceinline__ void find_slots(const Block<S>& block, unsigned split, Span span) {
    for (unsigned i = threadIdx.x; i < SPLIT; i += S::THREADS) {
        const unsigned position = split * SPLIT + i;
        block.slots[i] = span.holds(position) ? cache_slot(block.op.batch, block.task.seq_idx, position) : NONE;
    }
}

// Products of all queries and keys: each warp has some keys for 16 queries.
template <class S>
static __device__ __forceinline__ void multiply_keys(const Block<S>& block) {
    const unsigned warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const unsigned first_row = warp / S::WARPS_OF_ROWS * 16, first_key = warp % S::WARPS_OF_ROWS * S::KEY_TILES * 8;
    const bf16* query = block.queries + (first_row + lane % 16) * block.key_stride + lane / 16 * 8;
    const bf16* key = block.keys + (first_key + lane % 8) * block.key_stride + lane / 8 % 2 * 8;
    float products[S::KEY_TILES][4] = {};
    for (unsigned step = 0; step < padded(block.op.heads.key_dim); step += 16) {
        unsigned a[4], b[2];
        ldmatrix_x4(a, query + step);
        UNROLL for (unsigned tile = 0; tile < S::KEY_TILES; tile++) {
            ldmatrix_x2(b, key + tile * 8 * block.key_stride + step);
            mma_m16n8k16_bf16(products[tile], a, b);
        }
    }
    float* scores = block.scores + (first_row + lane / 4) * S::SCORE_STRIDE + first_key + lane % 4 * 2;
    UNROLL for (unsigned tile = 0; tile < S::KEY_TILES; tile++)
        UNROLL for (unsigned i = 0; i < 4; i++)
            scores[i / 2 * 8 * S::SCORE_STRIDE + tile * 8 + i % 2] = products[tile][i];
}

// Turns the products of this thread's pair into weights, with the other threads of the pair.
template <class S>
static __device__ __forceinline__ void weigh(const Block<S>& block, unsigned first, Sum& sum) {
    const Span own = block.pair.visible.within(first, S::TILE);
    const unsigned row = threadIdx.x / PAIR_THREADS, part = threadIdx.x % PAIR_THREADS;
    const float* products = block.scores + row * S::SCORE_STRIDE;
    float weights[S::WEIGHTS], max = -INFINITY, weight_sum = 0;
    UNROLL for (unsigned i = 0; i < S::WEIGHTS; i++) {
        const unsigned place = i * PAIR_THREADS + part, key = first + place;
        weights[i] = own.holds(key) ? score_of(block.op, block.pair, key, products[place]) : -INFINITY;
        max = fmaxf(max, weights[i]);
    }
    UNROLL for (int lanes = 1; lanes < PAIR_THREADS; lanes *= 2) max = fmaxf(max, across(max, lanes));
    max = fmaxf(max, sum.max);
    UNROLL for (unsigned i = 0; i < S::WEIGHTS; i++) {
        weights[i] = own.holds(first + i * PAIR_THREADS + part) ? expf(weights[i] - max) : 0;
        weight_sum += weights[i];
    }
    UNROLL for (int lanes = 1; lanes < PAIR_THREADS; lanes *= 2) weight_sum += across(weight_sum, lanes);
    // The products were read.
    __syncwarp();
    bf16* target = block.weights(row);
    UNROLL for (unsigned i = 0; i < S::WEIGHTS; i++) target[i * PAIR_THREADS + part] = from_float<bf16>(weights[i]);
    const float factor = own.is_empty() ? 1 : expf(sum.max - max);
    sum = {max, __fmaf_rn(sum.sum, factor, weight_sum)};
    if (block.is_first_of_pair) block.factors[row] = factor;
}

// First column of a warp's tile of values: neighbouring tiles are different warps'.
template <class S>
static __device__ __forceinline__ unsigned tile_column(unsigned tile) {
    return (tile * S::WARPS + threadIdx.x / WARP_SIZE) * 8;
}

// Row of a thread's fragment: the upper or the lower one.
static __device__ __forceinline__ unsigned fragment_row(unsigned row_tile, unsigned half) {
    return row_tile * 16 + half * 8 + threadIdx.x % WARP_SIZE / 4;
}

// Multiplies what there is by the factor of its row, and adds the weighted values of a tile.
template <class S>
static __device__ __forceinline__ void add_values(const Block<S>& block, Values<S>& values) {
    const unsigned lane = threadIdx.x % WARP_SIZE;
    UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++)
        UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++)
            UNROLL for (unsigned i = 0; i < 4; i++) values.of[m][n][i] *= block.factors[fragment_row(m, i / 2)];
    UNROLL for (unsigned step = 0; step < S::TILE; step += 32) {
        unsigned a[S::ROW_TILES][2][4];
        UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++)
            UNROLL for (unsigned half = 0; half < 2; half++)
                ldmatrix_x4(a[m][half], block.weights(m * 16 + lane % 16) + step + half * 16 + lane / 16 * 8);
        UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++) {
            if (tile_column<S>(n) < block.op.heads.value_dim) {
                unsigned b[4];
                ldmatrix_x4_trans(b, block.values + (step + lane) * block.value_stride + tile_column<S>(n));
                UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++) {
                    mma_m16n8k16_bf16(values.of[m][n], a[m][0], {b[0], b[1]});
                    mma_m16n8k16_bf16(values.of[m][n], a[m][1], {b[2], b[3]});
                }
            }
        }
    }
}

static __device__ __forceinline__ bool is_finite(bf16 value) { return (value.bits & 0x7f80u) != 0x7f80u; }

// Turns infinities and NaN among the values of the tile into zeros, and tells whether there were any: in a product
// they meet the weights of pairs that do not see them, which are zeros.
template <class S>
static __device__ __forceinline__ bool zero_non_finite(const Block<S>& block) {
    for (unsigned row = threadIdx.x / WARP_SIZE; row < S::TILE; row += S::WARPS)
        for (unsigned column = threadIdx.x % WARP_SIZE; column < block.op.heads.value_dim; column += WARP_SIZE) {
            bf16& value = block.values[row * block.value_stride + column];
            if (!is_finite(value)) {
                value = {0};
                *block.has_non_finite = 1;
            }
        }
    __syncthreads();
    return *block.has_non_finite != 0;
}

// Adds those values for the pairs that see them.
template <class S>
static __device__ __forceinline__ void add_non_finite(const Block<S>& block, unsigned first, Values<S>& values) {
    const unsigned value_dim = block.op.heads.value_dim;
    for (unsigned place = 0; place < S::TILE; place++) {
        const unsigned slot = block.slots[(first + place) % SPLIT];
        if (slot == NONE) continue;
        const bf16* row = block.op.cache + static_cast<size_t>(slot) * block.op.batch.width + block.value_start();
        UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++)
            UNROLL for (unsigned i = 0; i < 4 * S::ROW_TILES; i++) {
                const unsigned column = tile_column<S>(n) + threadIdx.x % 4 * 2 + i % 2;
                const unsigned pair = fragment_row(i / 4, i / 2 % 2);
                if (column < value_dim && block.visible[pair].holds(first + place) && !is_finite(row[column])) {
                    float& value = values.of[i / 4][n][i % 4];
                    value = __fmaf_rn(to_float(block.weights(pair)[place]), to_float(row[column]), value);
                }
            }
    }
}

// Takes a tile into the sums. Its keys were asked for, and the values with them if they are keys.
template <class S>
static __device__ __forceinline__ void attend(const Block<S>& block, unsigned first, bool is_last, Sum& sum,
                                              Values<S>& values) {
    if (!block.values_are_keys) copy_values(block, first);
    cp_async_commit_group();
    // All but these values.
    cp_async_wait_group<1>();
    __syncthreads();
    multiply_keys(block);
    __syncthreads();
    if (!block.values_are_keys && !is_last) copy_keys(block, first + S::TILE);
    cp_async_commit_group();
    if (block.has_pair) weigh(block, first, sum);
    if (threadIdx.x == 0) *block.has_non_finite = 0;
    // All but the next keys.
    cp_async_wait_group<1>();
    __syncthreads();
    const Span some = block.seen.by_some.within(first, S::TILE), all = block.seen.by_all.within(first, S::TILE);
    const bool has_non_finite = !all.is(some) && zero_non_finite(block);
    add_values(block, values);
    if (has_non_finite) add_non_finite(block, first, values);
    __syncthreads();
    if (block.values_are_keys && !is_last) copy_keys(block, first + S::TILE);
    if (block.values_are_keys) cp_async_commit_group();
}

// Calls `write` for each of the thread's fragments: with the pair, its row in the block, the first of two columns and
// both numbers.
template <class S, class Write>
static __device__ __forceinline__ void for_each_pair(const Block<S>& block, const Values<S>& values, Write write) {
    UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++)
        UNROLL for (unsigned half = 0; half < 2; half++) {
            const unsigned row = fragment_row(m, half);
            const Pair pair = pair_of(block.op, block.task, blockIdx.y, block.task.first_pair + row);
            UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++) {
                const unsigned column = tile_column<S>(n) + threadIdx.x % 4 * 2;
                if (pair.is_real() && column < block.op.heads.value_dim)
                    write(pair, row, column, values.of[m][n][2 * half], values.of[m][n][2 * half + 1]);
            }
        }
}

// The sums of a split that is a task of its own.
template <class S>
static __device__ __forceinline__ void write_partial(const Block<S>& block, unsigned split, Sum sum,
                                                     const Values<S>& values) {
    const auto sees_some = [&](const Pair& pair) { return !pair.visible.within(split * SPLIT, SPLIT).is_empty(); };
    const Partials& partials = block.op.partials;
    if (block.is_first_of_pair && sees_some(block.pair)) partials.sums[block.pair.slot(block.task)] = sum;
    for_each_pair(block, values, [&](const Pair& pair, unsigned, unsigned column, float first, float second) {
        if (!sees_some(pair)) return;
        float* target = partials.values + pair.slot(block.task) * block.op.heads.value_dim + column;
        target[0] = first;
        target[1] = second;
    });
}

// Joins a split with those before it.
template <class S>
static __device__ __forceinline__ void join_split(const Block<S>& block, unsigned split, Sum sum,
                                                  const Values<S>& values, Sum& total, Values<S>& total_values) {
    SHARED(Factors, factors, S::PAIRS);
    if (block.has_pair) {
        Factors own = {1, 0};
        if (!block.pair.visible.within(split * SPLIT, SPLIT).is_empty()) own = join(total, sum);
        if (block.is_first_of_pair) factors[threadIdx.x / PAIR_THREADS] = own;
    }
    __syncthreads();
    UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++)
        UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++)
            UNROLL for (unsigned i = 0; i < 4; i++) {
                float& value = total_values.of[m][n][i];
                value = join(value, values.of[m][n][i], factors[fragment_row(m, i / 2)]);
            }
}

template <class S>
static __device__ __forceinline__ void write_out(const Block<S>& block, Sum total, const Values<S>& values) {
    if (block.is_first_of_pair && block.pair.is_real())
        block.factors[threadIdx.x / PAIR_THREADS] = last_factor(total, block.op.learned.sinks, block.pair.head);
    __syncthreads();
    for_each_pair(block, values, [&](const Pair& pair, unsigned row, unsigned column, float first, float second) {
        bf16* out = block.op.out + pair.place(block.op.heads.num_heads) * block.op.heads.value_dim + column;
        const float factor = block.factors[row];
        *reinterpret_cast<unsigned*>(out) = both(from_float<bf16>(first * factor), from_float<bf16>(second * factor));
    });
}

template <class S>
static __device__ __forceinline__ void attention_mma(const Attention<bf16, bf16>& op) {
    const Block<S> block = block_of<S>(op);
    if (block.is_first_of_pair) block.visible[threadIdx.x / PAIR_THREADS] = block.pair.visible;
    copy_queries(block);
    Sum total = empty_sum();
    Values<S> total_values = {};
    for (unsigned split = block.task.first_split; split < block.task.end_split; split++) {
        const Span span = block.seen.by_some.within(split * SPLIT, SPLIT);
        if (span.is_empty()) continue;
        find_slots(block, split, span);
        __syncthreads();
        Sum sum = empty_sum();
        Values<S> values = {};
        const unsigned begin = span.start / S::TILE * S::TILE;
        copy_keys(block, begin);
        cp_async_commit_group();
        for (unsigned first = begin; first < span.end; first += S::TILE)
            attend(block, first, first + S::TILE >= span.end, sum, values);
        if (block.task.slot != NONE) return write_partial(block, split, sum, values);
        join_split(block, split, sum, values, total, total_values);
    }
    if (block.task.slot == NONE) write_out(block, total, total_values);
}

// For so many pairs of a task, and values of up to so many elements.
#define KERNEL(PAIRS, VALUE_DIM, WARPS, TILE)                                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP_SIZE, 1)                                                 \
        attention_mma_##PAIRS##_##VALUE_DIM(Attention<bf16, bf16> op) {                                                \
        attention_mma<Sizes<PAIRS, WARPS, TILE, VALUE_DIM>>(op);                                                       \
    }                                                                                                                  \
    EXPORT_KERNEL(attention_mma_##PAIRS##_##VALUE_DIM)

KERNEL(16, 128, 4, 64)
KERNEL(64, 128, 8, 64)
KERNEL(16, 256, 4, 64)
KERNEL(64, 256, 8, 64)
KERNEL(16, 512, 4, 32)
KERNEL(32, 512, 8, 32)
