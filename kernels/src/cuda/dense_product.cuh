// The product of a weight that is stored as numbers with a few rows, in f32.
//
// `DenseProduct` is that of bf16 with bf16 on matrix instructions. Each output is one chain of them over the columns,
// first to last, 32 columns in two instructions; a lane takes eight neighbours of both factors, the first four for the
// first. `plain_product` is for all other types: one chain of multiplications and additions over the columns for each
// output.

#pragma once

#include "product.cuh"

struct DenseWeight {
    // [rows, cols]; null where there is none.
    const void* values;
    // [rows], or null.
    const float* bias;
    unsigned rows, cols;
};

constexpr int DENSE_STEP_COLS = 32;
constexpr int DENSE_CHUNK_COLS = 128;
constexpr int DENSE_STEPS = DENSE_CHUNK_COLS / DENSE_STEP_COLS;
// From a token to the next in shared memory, in numbers: the loads of a quarter of a warp fall on all banks.
constexpr int DENSE_STRIDE = DENSE_CHUNK_COLS + 32;

template <int TILES>
struct alignas(16) DenseShared {
    bf16 tokens[2][TILE_TOKENS * TILES][DENSE_STRIDE];
    // Row of inputs of each token.
    unsigned sources[TILE_TOKENS * TILES];
};

// Eight numbers of a row, zeros behind its end. Rows of whole eights are aligned.
static __device__ __forceinline__ uint4 load_eight(const bf16* row, unsigned col, unsigned cols) {
    if (col >= cols) return uint4{0, 0, 0, 0};
    if (cols % LANE_COLS == 0) return *reinterpret_cast<const uint4*>(row + col);
    const auto pair = [&](unsigned at) {
        const unsigned low = at < cols ? row[at].bits : 0, high = at + 1 < cols ? row[at + 1].bits : 0;
        return low | high << 16;
    };
    return uint4{pair(col), pair(col + 2), pair(col + 4), pair(col + 6)};
}

// PANELS for each warp, TILES of 8 tokens for each block.
template <int PANELS, int TILES>
class DenseProduct {
  public:
    __device__ __forceinline__ DenseProduct(const DenseWeight& of_weight, unsigned first_of_block,
                                            const bf16* of_tokens, unsigned num, DenseShared<TILES>& of_block)
        : weight(static_cast<const bf16*>(of_weight.values)), tokens(of_tokens), shared(of_block), rows(of_weight.rows),
          cols(of_weight.cols), num_tokens(num), lane(threadIdx.x % WARP_SIZE),
          first_panel(first_of_block + threadIdx.x / WARP_SIZE * PANELS) {}

    // As `store` takes them.
    __device__ __forceinline__ void compute(float (&out)[PANELS][TILES][4]) {
        UNROLL for (int p = 0; p < PANELS; p++) {
            UNROLL for (int tile = 0; tile < TILES; tile++)
                UNROLL for (int i = 0; i < 4; i++) out[p][tile][i] = 0;
            UNROLL for (int step = 0; step < DENSE_STEPS; step++) load(p, step, 0);
        }
        start(0);
        for (unsigned first = 0; first < cols; first += DENSE_CHUNK_COLS) {
            start(first + DENSE_CHUNK_COLS);
            cp_async_wait_group<1>();
            __syncthreads();
            const auto& chunk = shared.tokens[first / DENSE_CHUNK_COLS % 2];
            UNROLL for (int step = 0; step < DENSE_STEPS; step++)
                if (first + step * DENSE_STEP_COLS < cols) multiply(chunk, first, step, out);
            __syncthreads();
        }
        cp_async_wait_group<0>();
    }

    __device__ __forceinline__ unsigned panel() const { return first_panel; }

  private:
    // A lane's two rows of a step.
    __device__ __forceinline__ void load(int p, int step, unsigned first_col) {
        const unsigned col = first_col + step * DENSE_STEP_COLS + lane % 4 * LANE_COLS;
        UNROLL for (int i = 0; i < 2; i++) {
            const unsigned row = (first_panel + p) * PANEL_ROWS + 2 * (lane / 4) + i;
            const bf16* at = weight + static_cast<size_t>(row) * cols;
            pairs[p][step][i] = row < rows ? load_eight(at, col, cols) : uint4{0, 0, 0, 0};
        }
    }

    // Starts the copies of the chunk from this column on, as far as there is one.
    __device__ __forceinline__ void start(unsigned first_col) {
        constexpr unsigned LOADS = DENSE_CHUNK_COLS / LANE_COLS;
        auto& chunk = shared.tokens[first_col / DENSE_CHUNK_COLS % 2];
        for (unsigned i = threadIdx.x; first_col < cols && i < TILE_TOKENS * TILES * LOADS; i += PRODUCT_THREADS) {
            const unsigned token = i / LOADS, at = i % LOADS * LANE_COLS, col = first_col + at;
            const bool is_there = token < num_tokens && col < cols;
            const bf16* row = tokens + (is_there ? static_cast<size_t>(shared.sources[token]) * cols : 0);
            bf16* to = &chunk[token][at];
            if (cols % LANE_COLS == 0) {
                cp_async(to, is_there ? row + col : row, is_there);
            } else {
                *reinterpret_cast<uint4*>(to) = is_there ? load_eight(row, col, cols) : uint4{0, 0, 0, 0};
            }
        }
        cp_async_commit_group();
    }

    __device__ __forceinline__ void multiply(const bf16 (&chunk)[TILE_TOKENS * TILES][DENSE_STRIDE], unsigned first,
                                             int step, float (&out)[PANELS][TILES][4]) {
        uint4 b[TILES];
        UNROLL for (int tile = 0; tile < TILES; tile++) {
            const bf16* at = &chunk[tile * TILE_TOKENS + lane / 4][step * DENSE_STEP_COLS + lane % 4 * LANE_COLS];
            b[tile] = *reinterpret_cast<const uint4*>(at);
        }
        UNROLL for (int p = 0; p < PANELS; p++) {
            const uint4 even = pairs[p][step][0], odd = pairs[p][step][1];
            load(p, step, first + DENSE_CHUNK_COLS);
            UNROLL for (int tile = 0; tile < TILES; tile++) {
                mma_m16n8k16_bf16(out[p][tile], {even.x, odd.x, even.y, odd.y}, {b[tile].x, b[tile].y});
                mma_m16n8k16_bf16(out[p][tile], {even.z, odd.z, even.w, odd.w}, {b[tile].z, b[tile].w});
            }
        }
    }

    const bf16 *const weight, *const tokens;
    DenseShared<TILES>& shared;
    const unsigned rows, cols, num_tokens;
    const int lane;
    const unsigned first_panel;
    // Of the next chunk, from where its step was used on.
    uint4 pairs[PANELS][DENSE_STEPS][2];
};

// One block: PANELS * PRODUCT_WARPS panels from the `first_panel`-th on, and up to 8 * TILES rows.
template <class T, int PANELS, int TILES>
static __device__ void dense_product(const DenseWeight& weight, unsigned first_panel, const bf16* input,
                                     const Rows& rows, T* out, unsigned out_width, DenseShared<TILES>& shared) {
    find_sources(rows, shared.sources);
    DenseProduct<PANELS, TILES> product(weight, first_panel, input, rows.count, shared);
    float values[PANELS][TILES][4];
    product.compute(values);
    store(values, product.panel(), weight.rows, weight.bias, rows, out, out_width);
}

// Outputs and tokens of a block of the plain product; a thread has one output of each.
constexpr int PLAIN_OUTS = 32;
constexpr int PLAIN_TOKENS = 8;
constexpr int PLAIN_COLS = 32;
static_assert(PLAIN_OUTS * PLAIN_TOKENS == ROW_THREADS);

struct PlainShared {
    // With a column more, in order that neighbours are in other banks.
    float weights[PLAIN_OUTS][PLAIN_COLS + 1];
    float tokens[PLAIN_TOKENS][PLAIN_COLS];
};

// One block of ROW_THREADS: PLAIN_OUTS outputs from `first_out` on, and up to PLAIN_TOKENS rows.
template <class W, class X, class T>
static __device__ void plain_product(const DenseWeight& weight, unsigned first_out, const X* input, const Rows& rows,
                                     T* out, unsigned out_width, PlainShared& shared) {
    const W* values = static_cast<const W*>(weight.values);
    const unsigned own_out = threadIdx.x % PLAIN_OUTS, own_token = threadIdx.x / PLAIN_OUTS, cols = weight.cols;
    float sum = 0;
    for (unsigned first = 0; first < cols; first += PLAIN_COLS) {
        // A warp reads a row.
        const unsigned in_row = threadIdx.x % PLAIN_COLS, col = first + in_row;
        for (unsigned row = threadIdx.x / PLAIN_COLS; row < PLAIN_OUTS; row += ROW_THREADS / PLAIN_COLS) {
            const bool is_there = first_out + row < weight.rows && col < cols;
            shared.weights[row][in_row] =
                is_there ? to_float(values[static_cast<size_t>(first_out + row) * cols + col]) : 0.0f;
        }
        const unsigned token = threadIdx.x / PLAIN_COLS;
        const bool is_there = token < rows.count && col < cols;
        shared.tokens[token][in_row] =
            is_there ? to_float(input[static_cast<size_t>(rows.source(token)) * cols + col]) : 0.0f;
        __syncthreads();
        const unsigned left = cols - first, len = left < PLAIN_COLS ? left : PLAIN_COLS;
        for (unsigned i = 0; i < len; i++)
            sum = __fmaf_rn(shared.tokens[own_token][i], shared.weights[own_out][i], sum);
        __syncthreads();
    }
    if (first_out + own_out >= weight.rows || own_token >= rows.count) return;
    const float value = weight.bias == nullptr ? sum : __fadd_rn(sum, weight.bias[first_out + own_out]);
    out[static_cast<size_t>(rows.target(own_token)) * out_width + first_out + own_out] = from_float<T>(value);
}
