// Attention on tensor cores, of bf16 over a cache of bf16: a block for each task (x) and key-value head (y).
//
// All sizes and places of `Heads`, the width of the cache and the `query_dims` are multiples of 8; queries and cache begin at
// multiples of 16 bytes, the output at one of 4. As in FlashAttention, a weight is rounded to bf16 before it meets its value, and
// the sum of weights is of what they were before.
//
// A tile goes through four stages with a barrier after each: its keys arrive; scores are computed, while the values arrive; the
// softmax turns scores into weights in their place, while the next keys arrive; weighted values are added. Warps share scores by
// rows and keys, values by columns. A pair's numbers are the same in all kernels of one TILE.

#include "attention.cuh"
#include "mma.cuh"

// Threads that turn the scores of a pair into weights.
constexpr unsigned PAIR_THREADS = 4;

template <unsigned PAIRS_, unsigned WARPS_, unsigned TILE_, unsigned VALUE_DIM>
struct Sizes {
    static constexpr unsigned PAIRS = PAIRS_, WARPS = WARPS_, THREADS = WARPS * WARP_SIZE;
    // Positions of a tile.
    static constexpr unsigned TILE = TILE_;
    // Products have 16 rows and 8 columns.
    static constexpr unsigned ROW_TILES = PAIRS / 16, WARPS_OF_ROWS = WARPS / ROW_TILES, KEY_TILES = TILE / 8 / WARPS_OF_ROWS;
    // Of a warp at most.
    static constexpr unsigned VALUE_TILES = VALUE_DIM / 8 / WARPS;
    // 16 bytes more than a whole number of 32: what a product takes of 8 rows together is in different banks.
    static constexpr unsigned SCORE_STRIDE = TILE + 4, WEIGHT_STRIDE = 2 * SCORE_STRIDE;
    static constexpr unsigned PARTS = TILE / PAIR_THREADS;
};

// A thread's part of the weighted values: its fragments of each tile of rows and columns.
template <class S>
struct Values {
    float of[S::ROW_TILES][S::VALUE_TILES][4];
};

// Dynamic memory. `2 * ((PAIRS + TILE) * stride_of(key_dim) + TILE * stride_of(value_dim)) + 4 * PAIRS * (TILE + 4)` bytes, without the
// values' part if they are keys.
template <class S>
struct Memory {
    // [PAIRS, key_stride]
    bf16* queries;
    // [TILE, key_stride]
    bf16* keys;
    // [TILE, value_stride]
    bf16* values;
    // [PAIRS, SCORE_STRIDE]; weights lie in the first half of each row.
    float* scores;
    unsigned key_stride, value_stride;
    // Whether there is one key-value head, whose value is part of its key.
    bool values_are_keys;

    __device__ __forceinline__ bf16* weights(unsigned row) const {
        return reinterpret_cast<bf16*>(scores) + row * S::WEIGHT_STRIDE;
    }
};

// What rows take of whole steps of a product.
static __device__ __forceinline__ unsigned padded(unsigned dim) { return (dim + 15) / 16 * 16; }
// And 16 bytes more, as scores have them.
static __device__ __forceinline__ unsigned stride_of(unsigned dim) { return padded(dim) + 8; }

template <class S>
static __device__ __forceinline__ Memory<S> lay_out(const Heads& heads, bf16* memory) {
    const unsigned key_end = heads.key_start + heads.key_dim, value_end = heads.value_start + heads.value_dim;
    const bool is_within = heads.key_start <= heads.value_start && value_end <= key_end;
    const bool values_are_keys = heads.group_size == heads.num_heads && is_within;
    const unsigned key_stride = stride_of(heads.key_dim), value_stride = values_are_keys ? key_stride : stride_of(heads.value_dim);
    bf16* keys = memory + S::PAIRS * key_stride;
    bf16* behind_keys = keys + S::TILE * key_stride;
    bf16* values = values_are_keys ? keys + heads.value_start - heads.key_start : behind_keys;
    bf16* scores = values_are_keys ? behind_keys : behind_keys + S::TILE * value_stride;
    return {memory, keys, values, reinterpret_cast<float*>(scores), key_stride, value_stride, values_are_keys};
}

// Asks for elements `first..first + dim` of the rows of the cache at a tile's slots; zeros where there is none.
template <class S>
static __device__ __forceinline__ void copy_rows(const Attention<bf16, bf16>& op, const unsigned* slots, unsigned first,
                                                 unsigned dim, bf16* target, unsigned stride) {
    const unsigned num_pieces = dim / 8;
    for (unsigned i = threadIdx.x; i < S::TILE * num_pieces; i += S::THREADS) {
        const unsigned row = i / num_pieces, element = i % num_pieces * 8, slot = slots[row];
        const size_t start = slot == NONE ? 0 : static_cast<size_t>(slot) * op.batch.width + first + element;
        cp_async(target + row * stride + element, op.cache + start, slot != NONE);
    }
}

// Asks for the queries, with zeros behind their ends, where the keys have them too, and for pairs that there are not.
template <class S>
static __device__ __forceinline__ void copy_queries(const Attention<bf16, bf16>& op, const Task& task, const Memory<S>& memory) {
    const unsigned dim = op.heads.key_dim, num_pieces = padded(dim) / 8;
    for (unsigned i = threadIdx.x; i < S::PAIRS * num_pieces; i += S::THREADS) {
        const unsigned row = i / num_pieces, element = i % num_pieces * 8;
        const Pair pair = pair_of(op, task, blockIdx.y, task.first_pair + row);
        const bool is_there = pair.is_real() && element < dim;
        const unsigned part = is_there && element >= op.query_dims[0];
        const size_t start = pair.place(op.heads.num_heads) * op.query_dims[part] + element - part * op.query_dims[0];
        cp_async(memory.queries + row * memory.key_stride + element, op.queries[part] + (is_there ? start : 0), is_there);
    }
    for (unsigned row = threadIdx.x; row < S::TILE && padded(dim) != dim; row += S::THREADS)
        cp_async(memory.keys + row * memory.key_stride + dim, op.cache, false);
}

// Products of all queries and keys: each warp has some keys for 16 queries.
template <class S>
static __device__ __forceinline__ void multiply_keys(const Memory<S>& memory, unsigned key_dim) {
    const unsigned warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const unsigned first_row = warp / S::WARPS_OF_ROWS * 16, first_key = warp % S::WARPS_OF_ROWS * S::KEY_TILES * 8;
    const bf16* query = memory.queries + (first_row + lane % 16) * memory.key_stride + lane / 16 * 8;
    const bf16* key = memory.keys + (first_key + lane % 8) * memory.key_stride + lane / 8 % 2 * 8;
    float products[S::KEY_TILES][4] = {};
    for (unsigned step = 0; step < padded(key_dim); step += 16) {
        unsigned a[4], b[2];
        ldmatrix_x4(a, query + step);
        UNROLL for (unsigned tile = 0; tile < S::KEY_TILES; tile++) {
            ldmatrix_x2(b, key + tile * 8 * memory.key_stride + step);
            mma_m16n8k16_bf16(products[tile], a, b);
        }
    }
    float* scores = memory.scores + (first_row + lane / 4) * S::SCORE_STRIDE + first_key + lane % 4 * 2;
    UNROLL for (unsigned tile = 0; tile < S::KEY_TILES; tile++)
        UNROLL for (unsigned i = 0; i < 4; i++)
            scores[i / 2 * 8 * S::SCORE_STRIDE + tile * 8 + i % 2] = products[tile][i];
}

// Turns the products of a pair into weights, by PAIR_THREADS threads of one warp. Gives what the values before are multiplied with.
template <class S>
static __device__ __forceinline__ float weigh(const Attention<bf16, bf16>& op, const Pair& pair, unsigned first, Sum& sum,
                                              const Memory<S>& memory) {
    const Span own = pair.visible.within(first, S::TILE);
    const unsigned row = threadIdx.x / PAIR_THREADS, part = threadIdx.x % PAIR_THREADS;
    const float* products = memory.scores + row * S::SCORE_STRIDE;
    float weights[S::PARTS], max = -INFINITY, weight_sum = 0;
    UNROLL for (unsigned i = 0; i < S::PARTS; i++) {
        const unsigned place = i * PAIR_THREADS + part;
        weights[i] = own.holds(first + place) ? score_of(op, pair, first + place, products[place]) : -INFINITY;
        max = fmaxf(max, weights[i]);
    }
    for (unsigned lanes = 1; lanes < PAIR_THREADS; lanes *= 2) max = fmaxf(max, across(max, static_cast<int>(lanes)));
    max = fmaxf(max, sum.max);
    UNROLL for (unsigned i = 0; i < S::PARTS; i++) {
        weights[i] = own.holds(first + i * PAIR_THREADS + part) ? expf(weights[i] - max) : 0;
        weight_sum += weights[i];
    }
    for (unsigned lanes = 1; lanes < PAIR_THREADS; lanes *= 2) weight_sum += across(weight_sum, static_cast<int>(lanes));
    // The products were read.
    __syncwarp();
    bf16* target = memory.weights(row);
    UNROLL for (unsigned i = 0; i < S::PARTS; i++) target[i * PAIR_THREADS + part] = from_float<bf16>(weights[i]);
    const float factor = own.is_empty() ? 1 : expf(sum.max - max);
    sum = {max, __fmaf_rn(sum.sum, factor, weight_sum)};
    return factor;
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
static __device__ __forceinline__ void add_values(const Memory<S>& memory, const float* factors, unsigned value_dim,
                                                  Values<S>& values) {
    const unsigned lane = threadIdx.x % WARP_SIZE;
    UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++)
        UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++)
            UNROLL for (unsigned i = 0; i < 4; i++) values.of[m][n][i] *= factors[fragment_row(m, i / 2)];
    UNROLL for (unsigned step = 0; step < S::TILE; step += 32) {
        unsigned a[S::ROW_TILES][2][4];
        UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++)
            UNROLL for (unsigned half = 0; half < 2; half++)
                ldmatrix_x4(a[m][half], memory.weights(m * 16 + lane % 16) + step + half * 16 + lane / 16 * 8);
        UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++) {
            if (tile_column<S>(n) < value_dim) {
                unsigned b[4];
                ldmatrix_x4_trans(b, memory.values + (step + lane) * memory.value_stride + tile_column<S>(n));
                UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++) {
                    mma_m16n8k16_bf16(values.of[m][n], a[m][0], {b[0], b[1]});
                    mma_m16n8k16_bf16(values.of[m][n], a[m][1], {b[2], b[3]});
                }
            }
        }
    }
}

static __device__ __forceinline__ bool is_finite(bf16 value) { return (value.bits & 0x7f80u) != 0x7f80u; }

// Whether there is an infinity or a NaN among the values of the tile, which become zeros: a product has them meet the weights of pairs
// that do not see them, which are zeros.
template <class S>
static __device__ __forceinline__ bool zero_non_finite(const Memory<S>& memory, unsigned value_dim, unsigned* are_there) {
    for (unsigned i = threadIdx.x; i < S::TILE * value_dim; i += S::THREADS) {
        bf16& value = memory.values[i / value_dim * memory.value_stride + i % value_dim];
        if (!is_finite(value)) {
            value = {0};
            *are_there = 1;
        }
    }
    __syncthreads();
    return *are_there != 0;
}

// Adds those values for the pairs that see them.
template <class S>
static __device__ __forceinline__ void add_non_finite(const Attention<bf16, bf16>& op, const Memory<S>& memory, const Span* visible,
                                                      const unsigned* slots, unsigned first, Values<S>& values) {
    const unsigned head_start = op.heads.value_start + blockIdx.y * op.heads.value_dim, element = threadIdx.x % 4 * 2;
    for (unsigned place = 0; place < S::TILE; place++) {
        if (slots[place] == NONE) continue;
        const bf16* row = op.cache + static_cast<size_t>(slots[place]) * op.batch.width + head_start;
        UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++)
            UNROLL for (unsigned i = 0; i < 4 * S::ROW_TILES; i++) {
                const unsigned column = tile_column<S>(n) + element + i % 2, pair = fragment_row(i / 4, i / 2 % 2);
                if (column < op.heads.value_dim && visible[pair].holds(first + place) && !is_finite(row[column])) {
                    float& value = values.of[i / 4][n][i % 4];
                    value = __fmaf_rn(to_float(memory.weights(pair)[place]), to_float(row[column]), value);
                }
            }
    }
}

// Calls `write` with the pair, the first of two columns, and the two numbers of each of the thread's fragments.
template <class S, class Write>
static __device__ __forceinline__ void for_each_pair(const Attention<bf16, bf16>& op, const Task& task, const Values<S>& values,
                                                     Write write) {
    UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++)
        UNROLL for (unsigned half = 0; half < 2; half++) {
            const unsigned row = fragment_row(m, half);
            const Pair pair = pair_of(op, task, blockIdx.y, task.first_pair + row);
            UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++) {
                const unsigned column = tile_column<S>(n) + threadIdx.x % 4 * 2;
                if (pair.is_real() && column < op.heads.value_dim)
                    write(pair, row, column, values.of[m][n][2 * half], values.of[m][n][2 * half + 1]);
            }
        }
}

template <class S>
static __device__ __forceinline__ void attention_mma(const Attention<bf16, bf16>& op) {
    DYNAMIC_SHARED(bf16, dynamic);
    SHARED(unsigned, slots, SPLIT);
    SHARED(Span, visible, S::PAIRS);
    SHARED(float, factors, S::PAIRS);
    SHARED(Factors, join_factors, S::PAIRS);
    SHARED(unsigned, non_finite, 1);
    const Heads& heads = op.heads;
    const Memory<S> memory = lay_out<S>(heads, dynamic);
    const Task task = op.tasks[blockIdx.x];
    const unsigned key_start = heads.key_start + blockIdx.y * heads.key_dim;
    const unsigned value_start = heads.value_start + blockIdx.y * heads.value_dim;
    const Seen block = seen(op, task, S::PAIRS);
    // The pair whose scores this thread turns into weights, if it has one.
    const unsigned own_row = threadIdx.x / PAIR_THREADS;
    const bool has_pair = own_row < S::PAIRS, is_first = threadIdx.x % PAIR_THREADS == 0;
    const Pair pair = pair_of(op, task, blockIdx.y, task.first_pair + own_row);
    if (has_pair && is_first) visible[own_row] = pair.visible;
    copy_queries(op, task, memory);

    Sum total = empty_sum();
    Values<S> total_values = {};
    for (unsigned split = task.first_split; split < task.end_split; split++) {
        const Span span = block.by_some.within(split * SPLIT, SPLIT);
        if (span.is_empty()) continue;
        for (unsigned i = threadIdx.x; i < SPLIT; i += S::THREADS) {
            const unsigned position = split * SPLIT + i;
            slots[i] = span.holds(position) ? cache_slot(op.batch, task.seq_idx, position) : NONE;
        }
        __syncthreads();
        const auto copy_keys = [&](unsigned first) {
            copy_rows<S>(op, slots + first % SPLIT, key_start, heads.key_dim, memory.keys, memory.key_stride);
        };
        Sum sum = empty_sum();
        Values<S> values = {};
        const unsigned begin = span.start / S::TILE * S::TILE;
        copy_keys(begin);
        cp_async_commit_group();
        for (unsigned first = begin; first < span.end; first += S::TILE) {
            const unsigned* tile_slots = slots + first % SPLIT;
            const bool is_last = first + S::TILE >= span.end;
            if (!memory.values_are_keys)
                copy_rows<S>(op, tile_slots, value_start, heads.value_dim, memory.values, memory.value_stride);
            cp_async_commit_group();
            // All but these values.
            cp_async_wait_group<1>();
            __syncthreads();
            multiply_keys(memory, heads.key_dim);
            __syncthreads();
            if (!memory.values_are_keys && !is_last) copy_keys(first + S::TILE);
            cp_async_commit_group();
            if (has_pair) {
                const float factor = weigh(op, pair, first, sum, memory);
                if (is_first) factors[own_row] = factor;
            }
            if (threadIdx.x == 0) *non_finite = 0;
            // All but the next keys.
            cp_async_wait_group<1>();
            __syncthreads();
            const bool are_alike = block.by_all.within(first, S::TILE).is(block.by_some.within(first, S::TILE));
            const bool are_apart = !are_alike && zero_non_finite(memory, heads.value_dim, non_finite);
            add_values(memory, factors, heads.value_dim, values);
            if (are_apart) add_non_finite(op, memory, visible, tile_slots, first, values);
            __syncthreads();
            if (memory.values_are_keys && !is_last) {
                copy_keys(first + S::TILE);
                cp_async_commit_group();
            }
        }
        if (has_pair) {
            Factors own = {1, 0};
            if (!pair.visible.within(split * SPLIT, SPLIT).is_empty()) {
                if (task.slot == NONE) own = join(total, sum);
                else if (is_first) op.partials.sums[pair.slot(task)] = sum;
            }
            if (is_first) join_factors[own_row] = own;
        }
        if (task.slot != NONE) {
            for_each_pair(op, task, values, [&](const Pair& other, unsigned, unsigned column, float first, float second) {
                if (other.visible.within(split * SPLIT, SPLIT).is_empty()) return;
                float* target = op.partials.values + other.slot(task) * heads.value_dim + column;
                target[0] = first;
                target[1] = second;
            });
            return;
        }
        __syncthreads();
        UNROLL for (unsigned m = 0; m < S::ROW_TILES; m++)
            UNROLL for (unsigned n = 0; n < S::VALUE_TILES; n++)
                UNROLL for (unsigned i = 0; i < 4; i++) {
                    const Factors& own = join_factors[fragment_row(m, i / 2)];
                    total_values.of[m][n][i] = join(total_values.of[m][n][i], values.of[m][n][i], own);
                }
    }
    if (has_pair && is_first && pair.is_real()) factors[own_row] = last_factor(total, op.learned.sinks, pair.head);
    __syncthreads();
    for_each_pair(op, task, total_values, [&](const Pair& other, unsigned row, unsigned column, float first, float second) {
        const bf16 rounded[2] = {from_float<bf16>(first * factors[row]), from_float<bf16>(second * factors[row])};
        bf16* out = op.out + other.place(heads.num_heads) * heads.value_dim + column;
        *reinterpret_cast<unsigned*>(out) = both(rounded[0], rounded[1]);
    });
}

// For so many pairs of a task, and values of up to so many elements.
#define KERNEL(PAIRS, VALUE_DIM, WARPS, TILE)                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP_SIZE, 1)                                    \
        attention_mma_##PAIRS##_##VALUE_DIM(Attention<bf16, bf16> op) {                                  \
        attention_mma<Sizes<PAIRS, WARPS, TILE, VALUE_DIM>>(op);                                         \
    }                                                                                                    \
    EXPORT_KERNEL(attention_mma_##PAIRS##_##VALUE_DIM)

KERNEL(16, 128, 4, 64)
KERNEL(64, 128, 8, 64)
KERNEL(16, 256, 4, 64)
KERNEL(64, 256, 8, 64)
KERNEL(16, 512, 4, 32)
KERNEL(32, 512, 8, 32)
