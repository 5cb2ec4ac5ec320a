// What the kernels of attention share: who sees what, and in which order sums are made.
//
// Pair `p` of a key-value head is row `p / group_size` of its sequence and head `p % group_size` of the group. What a
// pair gets is one chain of operations: within a split, the softmax goes on from tile to tile of positions under a
// running maximum; splits are joined in order. Tiles and splits begin at multiples of their length, and a tile in
// which a pair sees nothing leaves it as it is. So nothing depends on which pairs share a block, nor on whether
// splits are tasks of their own. Where a product is added to something, the instruction is written out: a
// compiler that is free to fuse the two may do so in one kernel and not in another.

#pragma once

#include "device.cuh"

// Positions of a split: whole tiles of every kernel.
constexpr unsigned SPLIT = 512;

// Where the heads lie in a row of the cache, in elements: key-value head `g` has its key at `key_start + g *
// key_dim`, its value at `value_start + g * value_dim`.
struct Heads {
    unsigned num_heads, group_size, key_start, key_dim, value_start, value_dim;
};

// As `ops/paged_attention` names them.
enum ReachKind : unsigned { FULL, WINDOW, CHUNK, SOURCE };

struct Reach {
    unsigned kind;
    // Of a window or chunk.
    unsigned size;
};

// `PagedBatch`, and the sizes of the cache `[num_blocks, block_size, width]` that its blocks are of.
struct Batch {
    const unsigned *cu_seqlens, *context_lens, *source_lens, *block_tables, *block_offsets;
    unsigned block_size, width;
};

// Each is null where there is none.
struct Learned {
    // [num_heads]
    const float* sinks;
    // [num_heads, 2 * max_distance + 1]
    const float* position_bias;
    unsigned max_distance;
};

// The pairs of a sequence from `first_pair` on, as many as a block of the kernel takes, over some splits. There is
// a `first_pair`.
struct Task {
    unsigned seq_idx, first_pair;
    unsigned first_split, end_split;
    // If the task is one split whose sums are to be joined with those of others, where they go: those of row `r` of
    // the sequence and head `h` to `slot + r * row_slots + h`. NONE if the task has all splits that its pairs see: it
    // writes the output.
    unsigned slot, row_slots;
};

// The softmax of a pair so far.
struct Sum {
    // The largest score.
    float max;
    // Of the weights, which are relative to it.
    float sum;
};

// The sums of splits that are tasks of their own.
struct Partials {
    // [num_slots]
    Sum* sums;
    // [num_slots, value_dim]
    float* values;
};

template <class T, class Cache>
struct Attention {
    // The query of a head is these one after the other, [num_tokens, num_heads, dim] each; a part that there is not
    // has no `dim`.
    const T* queries[2];
    unsigned query_dims[2];
    const Cache* cache;
    Batch batch;
    Heads heads;
    Reach reach;
    Learned learned;
    // Multiplies the scores.
    float scale;
    // [gridDim.x]
    const Task* tasks;
    Partials partials;
    // [num_tokens, num_heads, value_dim]
    T* out;
};

static __device__ __forceinline__ Sum empty_sum() { return {-INFINITY, 0.0f}; }

// What weighted values are multiplied with when the sums that they belong to are joined.
struct Factors {
    float own, later;
};

// Adds what later positions gave.
static __device__ __forceinline__ Factors join(Sum& sum, Sum later) {
    const float max = fmaxf(sum.max, later.max);
    const Factors factors = {expf(sum.max - max), expf(later.max - max)};
    sum = {max, __fmaf_rn(sum.sum, factors.own, later.sum * factors.later)};
    return factors;
}

static __device__ __forceinline__ float join(float value, float later, Factors factors) {
    return __fmaf_rn(value, factors.own, later * factors.later);
}

// What weighted values are multiplied with in the end. A sink is one more score, which has no value behind it.
static __device__ __forceinline__ float last_factor(Sum sum, const float* sinks, unsigned head) {
    if (sinks == nullptr) return 1.0f / sum.sum;
    const float max = fmaxf(sum.max, sinks[head]), own = expf(sum.max - max);
    return own / __fmaf_rn(sum.sum, own, expf(sinks[head] - max));
}

// Half-open.
struct Span {
    unsigned start, end;

    __device__ __forceinline__ bool is_empty() const { return start >= end; }
    __device__ __forceinline__ bool is(Span other) const { return start == other.start && end == other.end; }
    __device__ __forceinline__ bool holds(unsigned position) const { return start <= position && position < end; }
    __device__ __forceinline__ Span within(unsigned first, unsigned len) const {
        return {start > first ? start : first, end < first + len ? end : first + len};
    }
};

// A row and a head of it.
struct Pair {
    // Of the sequence, and of all.
    unsigned seq_row, row;
    unsigned head;
    // Of the row.
    unsigned position;
    // Positions that it sees; none if there is no such pair.
    Span visible;

    __device__ __forceinline__ bool is_real() const { return !visible.is_empty(); }

    // Where it is among all rows and heads.
    __device__ __forceinline__ size_t place(unsigned num_heads) const {
        return static_cast<size_t>(row) * num_heads + head;
    }

    __device__ __forceinline__ size_t slot(const Task& task) const {
        return task.slot + static_cast<size_t>(seq_row) * task.row_slots + head;
    }
};

static __device__ __forceinline__ Span visible(Reach reach, unsigned position, unsigned source_len) {
    if (reach.kind == SOURCE) return {0, source_len};
    unsigned start = 0;
    if (reach.kind == WINDOW && position + 1 > reach.size) start = position + 1 - reach.size;
    if (reach.kind == CHUNK) start = position / reach.size * reach.size;
    return {start > source_len ? start : source_len, position + 1};
}

template <class T, class Cache>
static __device__ __forceinline__ Pair pair_of(const Attention<T, Cache>& op, const Task& task, unsigned kv_head,
                                               unsigned idx) {
    const unsigned first_row = op.batch.cu_seqlens[task.seq_idx];
    const unsigned num_rows = op.batch.cu_seqlens[task.seq_idx + 1] - first_row;
    const unsigned seq_row = idx / op.heads.group_size;
    if (seq_row >= num_rows) return {0, 0, 0, 0, {0, 0}};
    const unsigned position = op.batch.context_lens[task.seq_idx] - num_rows + seq_row;
    return {seq_row, first_row + seq_row, kv_head * op.heads.group_size + idx % op.heads.group_size, position,
            visible(op.reach, position, op.batch.source_lens[task.seq_idx])};
}

// What some pairs see, from the first to the last position of any, and what all of them see.
struct Seen {
    Span by_some, by_all;
};

// Of so many pairs of a task: both ends rise with the row.
template <class T, class Cache>
static __device__ __forceinline__ Seen seen(const Attention<T, Cache>& op, const Task& task, unsigned num_pairs) {
    const unsigned num_rows = op.batch.cu_seqlens[task.seq_idx + 1] - op.batch.cu_seqlens[task.seq_idx];
    const unsigned all = num_rows * op.heads.group_size;
    const unsigned last_pair = task.first_pair + num_pairs < all ? task.first_pair + num_pairs - 1 : all - 1;
    const Span first = pair_of(op, task, 0, task.first_pair).visible, last = pair_of(op, task, 0, last_pair).visible;
    return {{first.start, last.end}, {last.start, first.end}};
}

// The slot of the cache that holds a position of a sequence.
static __device__ __forceinline__ unsigned cache_slot(const Batch& batch, unsigned seq_idx, unsigned position) {
    const unsigned block = batch.block_tables[batch.block_offsets[seq_idx] + position / batch.block_size];
    return block * batch.block_size + position % batch.block_size;
}

// What the distance of a key adds to the score.
static __device__ __forceinline__ float position_bias(const Learned& learned, const Pair& pair, unsigned key) {
    const int limit = static_cast<int>(learned.max_distance);
    const int distance = static_cast<int>(key) - static_cast<int>(pair.position);
    const int nearest = distance < -limit ? -limit : distance > limit ? limit : distance;
    const size_t start = static_cast<size_t>(pair.head) * (2 * learned.max_distance + 1);
    return learned.position_bias[start + static_cast<unsigned>(nearest + limit)];
}

// Of what query and key give.
template <class T, class Cache>
static __device__ __forceinline__ float score_of(const Attention<T, Cache>& op, const Pair& pair, unsigned key,
                                                 float product) {
    const float score = __fmul_rn(product, op.scale);
    return op.learned.position_bias == nullptr ? score : score + position_bias(op.learned, pair, key);
}
