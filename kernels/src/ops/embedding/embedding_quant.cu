// Rows of a quantized table, to the bit as the CPU reads them. One block of ROW_THREADS for each token, four columns for
// each thread: a warp has whole blocks of those that are turned.

#include "quant.cuh"
#include "rotation.cuh"

constexpr int WARP_COLS = WARP_SIZE * LANE_QUAD;

// Of a row's four columns from `col` on, which are in one group.
template <class F>
static __device__ __forceinline__ void read_quad(const PanelLayout<F>& layout, const unsigned char* panel, unsigned row,
                                                 unsigned col, unsigned group, float (&out)[LANE_QUAD]) {
    constexpr unsigned QUAD_BYTES = 4 * PANEL_ROWS;
    const unsigned even = row & ~1u;
    const auto own = [&](float2 of_both) { return row & 1 ? of_both.y : of_both.x; };
    const auto factors = [&](int which) {
        return *reinterpret_cast<const float2*>(panel + (which * PANEL_ROWS + even) * sizeof(float));
    };
    const float factor = own(factors(0));
    const float2 min_factors = F::Scaling::NUM_FACTORS == 2 ? factors(1) : float2{0, 0};
    const unsigned char* of_group = panel + layout.SCALES_START + col / group * F::Scaling::GROUP_BYTES;
    const float scale = __fmul_rn(own(F::Scaling::scales(of_group, even)), factor);
    const float min = __fmul_rn(own(F::Scaling::minima(of_group, even, min_factors)), factor);
    const unsigned quad = F::Decoding::ARE_NIBBLES ? col / 8 : col / 4;
    unsigned codes =
        *reinterpret_cast<const unsigned*>(panel + layout.codes_start + quad * QUAD_BYTES + row * LANE_QUAD);
    if (F::Decoding::ARE_NIBBLES) codes >>= col % 8;
    UNROLL for (int i = 0; i < LANE_QUAD; i++) {
        const unsigned code = codes >> (8 * i) & (F::Decoding::ARE_NIBBLES ? 15 : 255);
        const float number = static_cast<float>(static_cast<int>(F::Decoding::factor(code)) - F::OFFSET);
        out[i] = __fadd_rn(__fmul_rn(scale, number), min);
    }
}

// ids: [num_tokens], all in the table; out: [num_tokens, table.cols]
template <class T>
static __device__ void embedding_quant(const unsigned* ids, const QuantWeight& table, T* out) {
    const unsigned id = ids[blockIdx.x];
    const int lane = threadIdx.x % WARP_SIZE;
    out += static_cast<size_t>(blockIdx.x) * table.cols;
    with_format(table.codes, [&](auto format) {
        const PanelLayout<decltype(format)> layout(table);
        const unsigned char* panel = table.bytes + id / PANEL_ROWS * layout.panel_bytes;
        for (unsigned first = threadIdx.x / WARP_SIZE * WARP_COLS; first < layout.padded_cols;
             first += ROW_WARPS * WARP_COLS) {
            const unsigned col = first + lane * LANE_QUAD;
            float values[LANE_QUAD] = {0, 0, 0, 0};
            if (col < layout.padded_cols) read_quad(layout, panel, id % PANEL_ROWS, col, table.group, values);
            if (table.codes == Codes::Int8Rotated) rotate(values, lane);
            UNROLL for (int i = 0; i < LANE_QUAD; i++)
                if (col + i < table.cols) out[col + i] = from_float<T>(values[i]);
        }
    });
}

#define KERNEL(T)                                                               \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                   \
        embedding_quant_##T(const unsigned* ids, QuantWeight table, T* out) {   \
        embedding_quant<T>(ids, table, out);                                    \
    }                                                                           \
    EXPORT_KERNEL(embedding_quant_##T)

KERNEL(float)
KERNEL(bf16)
