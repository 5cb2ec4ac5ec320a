// Quantized weights and activations as they lie in memory, which is as on the CPU: `quant/layout.rs` says it.

#pragma once

#include "product.cuh"

// As `quant` names them.
enum class Codes : unsigned { Int8, Int8Min, Int4, Int4Min, Int8Rotated, Int4Double, Fp4 };

// Columns that an instruction multiplies.
constexpr int STEP_COLS = 32;

// Of a group of a row of activations, `x = scale * code`.
struct alignas(8) Terms {
    float scale;
    // Of the codes.
    int sum;
};

struct QuantWeight {
    // From a multiple of 64 bytes; null where there is none.
    const unsigned char* bytes;
    // [rows], or null.
    const float* bias;
    Codes codes;
    unsigned group, rows, cols;
};

// How codes become factors, and what is taken off these: `factors` of what is at a lane's rows, from its first column
// on, `factor` of a single one.

struct BytesOfCodes {
    static constexpr int LOADS = 2;
    static constexpr bool ARE_NIBBLES = false;

    static __device__ __forceinline__ unsigned factor(unsigned code) { return code; }

    static __device__ __forceinline__ void factors(const uint2 (&codes)[LOADS], unsigned (&a)[4]) {
        a[0] = codes[0].x, a[1] = codes[0].y, a[2] = codes[1].x, a[3] = codes[1].y;
    }
};

struct NibblesOfCodes {
    static constexpr int LOADS = 1;
    static constexpr bool ARE_NIBBLES = true;

    static __device__ __forceinline__ unsigned factor(unsigned code) { return code; }

    static __device__ __forceinline__ void factors(const uint2 (&codes)[LOADS], unsigned (&a)[4]) {
        constexpr unsigned LOWER = 0x0f0f0f0fu;
        a[0] = codes[0].x & LOWER, a[1] = codes[0].y & LOWER;
        a[2] = codes[0].x >> 4 & LOWER, a[3] = codes[0].y >> 4 & LOWER;
    }
};

struct NibblesOfFp4 : NibblesOfCodes {
    // Entries of a table of 16 bytes below 128 at the four halves of the lower two bytes: 12 plus the code's number
    // doubled.
    static __device__ __forceinline__ unsigned look_up(unsigned halves) {
        const unsigned positive = permute_bytes(0x0f0e0d0cu, 0x18141210u, halves & 0x7777u);
        const unsigned negative = permute_bytes(0x090a0b0cu, 0x00040608u, halves & 0x7777u);
        // 0x80 where the code is positive, which takes no bit of a byte below 128.
        const unsigned is_negative = permute_bytes(0x80808080u, 0, halves & 0x8888u);
        return (positive & ~is_negative) | (negative & is_negative);
    }

    static __device__ __forceinline__ unsigned factor(unsigned code) { return look_up(code) & 0xff; }

    static __device__ __forceinline__ void factors(const uint2 (&codes)[LOADS], unsigned (&a)[4]) {
        const unsigned first[2] = {look_up(codes[0].x), look_up(codes[0].y)};
        const unsigned last[2] = {look_up(codes[0].x >> 16), look_up(codes[0].y >> 16)};
        for (int row = 0; row < 2; row++) {
            a[row] = permute_bytes(first[row], last[row], 0x6420u);
            a[row + 2] = permute_bytes(first[row], last[row], 0x7531u);
        }
    }
};

// Scales and minima of a lane's two rows, before their factors. `group` holds those of 16 rows.

struct PlainScales {
    static constexpr int GROUP_BYTES = 2 * PANEL_ROWS, NUM_FACTORS = 1;
    static constexpr bool HAVE_MIN = false;

    static __device__ __forceinline__ float2 scales(const unsigned char* group, int row) {
        const unsigned pair = *reinterpret_cast<const unsigned*>(group + 2 * row);
        const f16 first = {static_cast<unsigned short>(pair)}, second = {static_cast<unsigned short>(pair >> 16)};
        return {to_float(first), to_float(second)};
    }

    static __device__ __forceinline__ float2 minima(const unsigned char*, int, float2) { return {0, 0}; }
};

struct ScalesWithMin : PlainScales {
    static constexpr int GROUP_BYTES = 4 * PANEL_ROWS;
    static constexpr bool HAVE_MIN = true;

    static __device__ __forceinline__ float2 minima(const unsigned char* group, int row, float2) {
        return scales(group + 2 * PANEL_ROWS, row);
    }
};

struct DoubleScales {
    static constexpr int GROUP_BYTES = 2 * PANEL_ROWS, NUM_FACTORS = 2;
    static constexpr bool HAVE_MIN = true;

    static __device__ __forceinline__ float2 scales(const unsigned char* group, int row) {
        const unsigned pair = *reinterpret_cast<const unsigned short*>(group + row);
        return {static_cast<float>(pair & 0xff), static_cast<float>(pair >> 8)};
    }

    static __device__ __forceinline__ float2 minima(const unsigned char* group, int row, float2 factors) {
        const float2 codes = scales(group + PANEL_ROWS, row);
        return {(codes.x - 128) * factors.x, (codes.y - 128) * factors.y};
    }
};

template <class OfCodes, class OfScales, int CENTER>
struct Format {
    using Decoding = OfCodes;
    using Scaling = OfScales;
    // What the product takes off every factor.
    static constexpr int OFFSET = CENTER;
};

// Where things are in a panel.
template <class F>
struct PanelLayout {
    static constexpr unsigned LINE = 64;
    static constexpr unsigned SCALES_START = F::Scaling::NUM_FACTORS * 4 * PANEL_ROWS;
    unsigned num_groups, padded_cols, codes_start;
    size_t panel_bytes;

    __device__ __forceinline__ explicit PanelLayout(const QuantWeight& weight) {
        num_groups = (weight.cols + weight.group - 1) / weight.group;
        padded_cols = num_groups * weight.group;
        const unsigned scales_end = SCALES_START + num_groups * F::Scaling::GROUP_BYTES;
        codes_start = (scales_end + LINE - 1) / LINE * LINE;
        panel_bytes = codes_start + static_cast<size_t>(padded_cols) * PANEL_ROWS / (F::Decoding::ARE_NIBBLES ? 2 : 1);
    }
};

// Calls `work` with the format of a weight.
template <class Work>
static __device__ __forceinline__ void with_format(Codes codes, Work work) {
    switch (codes) {
        case Codes::Int8:
        case Codes::Int8Rotated: return work(Format<BytesOfCodes, PlainScales, 128>{});
        case Codes::Int8Min: return work(Format<BytesOfCodes, ScalesWithMin, 0>{});
        case Codes::Int4: return work(Format<NibblesOfCodes, PlainScales, 8>{});
        case Codes::Int4Min: return work(Format<NibblesOfCodes, ScalesWithMin, 0>{});
        case Codes::Int4Double: return work(Format<NibblesOfCodes, DoubleScales, 0>{});
        case Codes::Fp4: return work(Format<NibblesOfFp4, PlainScales, 12>{});
    }
}
