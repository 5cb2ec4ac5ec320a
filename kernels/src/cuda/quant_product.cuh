// The product of a quantized weight with a few quantized rows, to the bit that of the CPU: exact in integers within a
// group, whose results are added in f32, first to last.
//
// Weights are the rows of a matrix instruction and tokens its columns. A warp has panels of its own and reads their
// codes straight into registers, a chunk ahead; the block's tokens and all scales go through shared memory, a chunk
// ahead too. Which columns an instruction takes together is free within a group: a lane takes eight neighbours of both
// factors.

#pragma once

#include "product.cuh"
#include "quant.cuh"

// Columns of a chunk, the largest group.
constexpr int CHUNK_SHIFT = 7;
constexpr int CHUNK_COLS = 1 << CHUNK_SHIFT;
constexpr int CHUNK_STEPS = CHUNK_COLS / STEP_COLS;
// Groups of a chunk where they are smallest.
constexpr int MAX_GROUPS = CHUNK_COLS / 16;
// From a token to the next in shared memory, in bytes: the loads of half a warp fall on all banks.
constexpr int TOKEN_STRIDE = CHUNK_COLS + 32;
constexpr int COPY_BYTES = 16;

struct QuantRows {
    // [num_rows, padded cols], from a multiple of 16 bytes
    const signed char* codes;
    // [num_rows, num_groups]
    const Terms* terms;
};

// What a block has of a chunk.
template <int PANELS, int TILES>
struct alignas(COPY_BYTES) Chunk {
    unsigned char codes[TILE_TOKENS * TILES][TOKEN_STRIDE];
    Terms terms[MAX_GROUPS][TILE_TOKENS * TILES];
    unsigned char scales[PANELS * PRODUCT_WARPS][MAX_GROUPS * ScalesWithMin::GROUP_BYTES];
};

template <int PANELS, int TILES>
struct ProductShared {
    Chunk<PANELS, TILES> chunks[2];
    // Row of inputs of each token.
    unsigned sources[TILE_TOKENS * TILES];
};

// The bits of 1.5 * 2^23, which integers up to 2^22 are added to in order to become floats: 255 * 127 * 128 is the
// largest.
constexpr int FLOAT_BITS = 0x4b400000;
constexpr float FLOAT_OF_BITS = 12582912.0f;

// PANELS for each warp, TILES of 8 tokens for each block.
template <class F, int PANELS, int TILES>
class QuantProduct {
  public:
    __device__ __forceinline__ QuantProduct(const QuantWeight& of_weight, unsigned first_of_block,
                                            const QuantRows& of_rows, unsigned tokens,
                                            ProductShared<PANELS, TILES>& of_block)
        : bytes(of_weight.bytes), layout(of_weight), rows(of_rows), shared(of_block), num_tokens(tokens),
          group_shift(__popc(of_weight.group - 1)), block_panel(first_of_block),
          num_panels((of_weight.rows + PANEL_ROWS - 1) / PANEL_ROWS), lane(threadIdx.x % WARP_SIZE),
          warp(threadIdx.x / WARP_SIZE) {}

    // As `store` takes them.
    __device__ __forceinline__ void compute(float (&out)[PANELS][TILES][4]) {
        UNROLL for (int p = 0; p < PANELS; p++) {
            min_factors[p] = F::Scaling::NUM_FACTORS == 2 && exists(p) ? factors(p, 1) : float2{0, 0};
            UNROLL for (int tile = 0; tile < TILES; tile++)
                UNROLL for (int i = 0; i < 4; i++) {
                    out[p][tile][i] = 0;
                    sums[p][tile][i] = FLOAT_BITS;
                }
            UNROLL for (int step = 0; step < CHUNK_STEPS; step++) load(p, step, step * STEP_COLS);
        }
        start(0);
        for (unsigned first = 0; first < layout.padded_cols; first += CHUNK_COLS) {
            start(first + CHUNK_COLS);
            cp_async_wait_group<1>();
            __syncthreads();
            const Chunk<PANELS, TILES>& chunk = shared.chunks[first / CHUNK_COLS % 2];
            UNROLL for (int step = 0; step < CHUNK_STEPS; step++)
                if (first + step * STEP_COLS < layout.padded_cols) multiply(chunk, first, step, out);
            __syncthreads();
        }
        cp_async_wait_group<0>();
        UNROLL for (int p = 0; p < PANELS; p++) {
            if (!exists(p)) continue;
            const float2 factor = factors(p, 0);
            UNROLL for (int tile = 0; tile < TILES; tile++)
                UNROLL for (int i = 0; i < 4; i++)
                    out[p][tile][i] = __fmul_rn(out[p][tile][i], i < 2 ? factor.x : factor.y);
        }
    }

    __device__ __forceinline__ unsigned panel_of(int p) const { return block_panel + warp * PANELS + p; }

  private:
    __device__ __forceinline__ bool exists(int p) const { return panel_of(p) < num_panels; }

    __device__ __forceinline__ const unsigned char* panel(unsigned idx) const {
        return bytes + idx * layout.panel_bytes;
    }

    __device__ __forceinline__ float2 factors(int p, int which) const {
        const unsigned char* at = panel(panel_of(p)) + (which * PANEL_ROWS + 2 * (lane / 4)) * sizeof(float);
        return *reinterpret_cast<const float2*>(at);
    }

    // A lane's codes of a step. Eight columns are one load where two share a byte, and two loads where not.
    __device__ __forceinline__ void load(int p, int step, unsigned first_col) {
        constexpr int QUAD_BYTES = 4 * PANEL_ROWS, LOADS = F::Decoding::LOADS;
        const unsigned col = first_col + lane % 4 * LANE_COLS;
        const bool is_there = exists(p) && col < layout.padded_cols;
        const unsigned at = layout.codes_start + col / LANE_COLS * LOADS * QUAD_BYTES + 2 * (lane / 4) * 4;
        UNROLL for (int i = 0; i < LOADS; i++) {
            const unsigned char* from = panel(panel_of(p)) + at + i * QUAD_BYTES;
            codes[p][step][i] = is_there ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0};
        }
    }

    // Starts the copies of the chunk from this column on, as far as there is one.
    __device__ __forceinline__ void start(unsigned first_col) {
        if (first_col < layout.padded_cols) {
            Chunk<PANELS, TILES>& chunk = shared.chunks[first_col / CHUNK_COLS % 2];
            start_tokens(chunk, first_col);
            start_scales(chunk, first_col);
        }
        cp_async_commit_group();
    }

    __device__ __forceinline__ void start_tokens(Chunk<PANELS, TILES>& chunk, unsigned first_col) {
        constexpr unsigned COPIES = CHUNK_COLS / COPY_BYTES, TOKENS = TILE_TOKENS * TILES;
        for (unsigned i = threadIdx.x; i < TOKENS * COPIES; i += PRODUCT_THREADS) {
            const unsigned token = i / COPIES, col = first_col + i % COPIES * COPY_BYTES;
            const size_t row = static_cast<size_t>(shared.sources[token]) * layout.padded_cols;
            const bool is_there = token < num_tokens && col < layout.padded_cols;
            const signed char* from = rows.codes + (is_there ? row + col : 0);
            cp_async<COPY_BYTES>(&chunk.codes[token][col - first_col], from, is_there);
        }
        const unsigned shift = CHUNK_SHIFT - group_shift;
        for (unsigned i = threadIdx.x; i < TOKENS << shift; i += PRODUCT_THREADS) {
            const unsigned token = i >> shift, group = i & ((1u << shift) - 1);
            const unsigned idx = (first_col >> group_shift) + group;
            const size_t row = static_cast<size_t>(shared.sources[token]) * layout.num_groups;
            const bool is_there = token < num_tokens && idx < layout.num_groups;
            cp_async<sizeof(Terms)>(&chunk.terms[group][token], rows.terms + (is_there ? row + idx : 0), is_there);
        }
    }

    __device__ __forceinline__ void start_scales(Chunk<PANELS, TILES>& chunk, unsigned first_col) {
        constexpr unsigned GROUP_COPIES = F::Scaling::GROUP_BYTES / COPY_BYTES, BLOCK_PANELS = PANELS * PRODUCT_WARPS;
        const unsigned shift = CHUNK_SHIFT - group_shift + (GROUP_COPIES == 4 ? 2 : 1);
        const unsigned first = (first_col >> group_shift) * GROUP_COPIES;
        for (unsigned i = threadIdx.x; i < BLOCK_PANELS << shift; i += PRODUCT_THREADS) {
            const unsigned idx = block_panel + (i >> shift), part = i & ((1u << shift) - 1);
            const bool is_there = idx < num_panels && first + part < layout.num_groups * GROUP_COPIES;
            const unsigned at = layout.SCALES_START + (first + part) * COPY_BYTES;
            const unsigned char* from = is_there ? panel(idx) + at : bytes;
            cp_async<COPY_BYTES>(&chunk.scales[i >> shift][part * COPY_BYTES], from, is_there);
        }
    }

    // A step of all panels and tokens, and behind it the results of the groups that end there.
    __device__ __forceinline__ void multiply(const Chunk<PANELS, TILES>& chunk, unsigned first, int step,
                                             float (&out)[PANELS][TILES][4]) {
        unsigned a[PANELS][4], b[TILES][2];
        UNROLL for (int tile = 0; tile < TILES; tile++) {
            const unsigned char* of_token = chunk.codes[tile * TILE_TOKENS + lane / 4];
            const uint2 loaded = *reinterpret_cast<const uint2*>(of_token + step * STEP_COLS + lane % 4 * LANE_COLS);
            b[tile][0] = loaded.x, b[tile][1] = loaded.y;
        }
        UNROLL for (int p = 0; p < PANELS; p++) {
            F::Decoding::factors(codes[p][step], a[p]);
            load(p, step, first + CHUNK_COLS + step * STEP_COLS);
        }
        const unsigned end = (step + 1) * STEP_COLS;
        if (1 << group_shift >= STEP_COLS) {
            add(a, b);
            if (end >> group_shift << group_shift == end) finish(chunk, (end >> group_shift) - 1, out);
            return;
        }
        // Two groups: either half of the lanes' columns once with zeros in place of the other.
        UNROLL for (int half = 0; half < 2; half++) {
            unsigned part[TILES][2];
            UNROLL for (int tile = 0; tile < TILES; tile++)
                UNROLL for (int i = 0; i < 2; i++) part[tile][i] = lane % 4 / 2 == half ? b[tile][i] : 0;
            add(a, part);
            finish(chunk, step * 2 + half, out);
        }
    }

    __device__ __forceinline__ void add(const unsigned (&a)[PANELS][4], const unsigned (&b)[TILES][2]) {
        UNROLL for (int tile = 0; tile < TILES; tile++)
            UNROLL for (int p = 0; p < PANELS; p++) mma_m16n8k32_u8_s8(sums[p][tile], a[p], b[tile]);
    }

    // Adds a group's integers, scaled, to the results.
    __device__ __forceinline__ void finish(const Chunk<PANELS, TILES>& chunk, unsigned group,
                                           float (&out)[PANELS][TILES][4]) {
        float2 scales[PANELS], minima[PANELS];
        UNROLL for (int p = 0; p < PANELS; p++) {
            const unsigned char* of_group = &chunk.scales[warp * PANELS + p][group * F::Scaling::GROUP_BYTES];
            scales[p] = F::Scaling::scales(of_group, 2 * (lane / 4));
            minima[p] = F::Scaling::minima(of_group, 2 * (lane / 4), min_factors[p]);
        }
        UNROLL for (int tile = 0; tile < TILES; tile++) {
            const Terms* of_tokens = &chunk.terms[group][tile * TILE_TOKENS + lane % 4 * 2];
            const uint4 loaded = *reinterpret_cast<const uint4*>(of_tokens);
            const float x_scale[2] = {__uint_as_float(loaded.x), __uint_as_float(loaded.z)};
            const int x_sum[2] = {static_cast<int>(loaded.y), static_cast<int>(loaded.w)};
            UNROLL for (int p = 0; p < PANELS; p++)
                UNROLL for (int i = 0; i < 4; i++) {
                    const int sum = sums[p][tile][i] - F::OFFSET * x_sum[i % 2];
                    const float number = __uint_as_float(static_cast<unsigned>(sum)) - FLOAT_OF_BITS;
                    const float scale = __fmul_rn(i < 2 ? scales[p].x : scales[p].y, x_scale[i % 2]);
                    float& value = out[p][tile][i];
                    value = __fmaf_rn(number, scale, value);
                    if (F::Scaling::HAVE_MIN) {
                        const float scaled_sum = __fmul_rn(x_scale[i % 2], static_cast<float>(x_sum[i % 2]));
                        value = __fmaf_rn(i < 2 ? minima[p].x : minima[p].y, scaled_sum, value);
                    }
                    sums[p][tile][i] = FLOAT_BITS;
                }
        }
    }

    const unsigned char* const bytes;
    const PanelLayout<F> layout;
    const QuantRows& rows;
    ProductShared<PANELS, TILES>& shared;
    const unsigned num_tokens, group_shift, block_panel, num_panels;
    const int lane, warp;
    float2 min_factors[PANELS];
    int sums[PANELS][TILES][4];
    // Of the next chunk, from where its step was used on.
    uint2 codes[PANELS][CHUNK_STEPS][F::Decoding::LOADS];
};

// One block: PANELS * PRODUCT_WARPS panels from the `first_panel`-th on, and up to TILE_TOKENS * TILES rows.
template <class T, int PANELS, int TILES>
static __device__ void quant_product(const QuantWeight& weight, unsigned first_panel, const QuantRows& input,
                                     const Rows& rows, T* out, unsigned out_width, ProductShared<PANELS,
                                     TILES>& shared) {
    find_sources(rows, shared.sources);
    with_format(weight.codes, [&](auto format) {
        QuantProduct<decltype(format), PANELS, TILES> product(weight, first_panel, input, rows.count, shared);
        float values[PANELS][TILES][4];
        product.compute(values);
        store(values, product.panel_of(0), weight.rows, weight.bias, rows, out, out_width);
    });
}
