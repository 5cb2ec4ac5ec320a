// Input rows in int8 under a scale for each group, to the bit those of `quant/activations.rs`. One block of ROW_THREADS
// for each row, four columns for each thread: a warp has whole groups, and whole blocks of those that are turned.

#include "quant.cuh"
#include "rotation.cuh"

constexpr int WARP_COLS = WARP_SIZE * LANE_QUAD;

// x: [num_rows, cols]; codes: [num_rows, padded cols], from a multiple of 4 bytes; terms: [num_rows, num_groups].
// Groups are 16, 32, 64 or 128 columns, of turned rows 64 or 128. Rows from `num_rows[0]` on are left alone where it is
// not null.
template <class T>
static __device__ void quantize_rows(const T* x, signed char* codes, Terms* terms, unsigned cols, unsigned group,
                                     unsigned is_rotated, const unsigned* num_rows) {
    if (num_rows != nullptr && blockIdx.x >= num_rows[0]) return;
    const unsigned num_groups = (cols + group - 1) / group, padded_cols = num_groups * group;
    const int lane = threadIdx.x % WARP_SIZE;
    x += static_cast<size_t>(blockIdx.x) * cols;
    codes += static_cast<size_t>(blockIdx.x) * padded_cols;
    terms += static_cast<size_t>(blockIdx.x) * num_groups;
    for (unsigned first = threadIdx.x / WARP_SIZE * WARP_COLS; first < padded_cols; first += ROW_WARPS * WARP_COLS) {
        const unsigned col = first + lane * LANE_QUAD;
        float values[LANE_QUAD];
        UNROLL for (int i = 0; i < LANE_QUAD; i++) values[i] = col + i < cols ? to_float(x[col + i]) : 0.0f;
        if (is_rotated) rotate(values, lane);
        // Without the sign, the bits of numbers are ordered as they are, and those of infinities and NaN are behind
        // them.
        unsigned largest = 0;
        UNROLL for (int i = 0; i < LANE_QUAD; i++) {
            const unsigned magnitude = __float_as_uint(values[i]) & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        }
        for (unsigned lanes = group / LANE_QUAD / 2; lanes > 0; lanes /= 2) {
            const unsigned other = across(largest, lanes);
            largest = other > largest ? other : largest;
        }
        const bool is_number = largest < 0x7f800000u;
        const float top = __uint_as_float(largest);
        // A group of denormals has an inverse that is none.
        float inverse = 127.0f / top;
        if (!is_number || !(inverse < INFINITY)) inverse = 0;
        int sum = 0;
        unsigned quad = 0;
        UNROLL for (int i = 0; i < LANE_QUAD; i++) {
            const int code = is_number ? __float2int_rn(values[i] * inverse) : 0;
            sum += code;
            quad |= (static_cast<unsigned>(code) & 0xff) << (8 * i);
        }
        for (unsigned lanes = group / LANE_QUAD / 2; lanes > 0; lanes /= 2)
            sum += across(sum, static_cast<int>(lanes));
        if (col >= padded_cols) continue;
        *reinterpret_cast<unsigned*>(codes + col) = quad;
        if (col % group == 0) terms[col / group] = {is_number ? top / 127.0f : NAN, sum};
    }
}

#define KERNELS(T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                          \
        quantize_rows_##T(const T* x, signed char* codes, Terms* terms, unsigned cols, unsigned group, \
                          unsigned is_rotated, const unsigned* num_rows) {                             \
        quantize_rows<T>(x, codes, terms, cols, group, is_rotated, num_rows);                          \
    }                                                                                                  \
    EXPORT_KERNEL(quantize_rows_##T)

KERNELS(float)
KERNELS(bf16)
