// The plain ops of candle's CUDA backend that models use, by the names and arguments of its own kernels.

#include <cstring>

namespace {

struct bf16 {
    unsigned short bits;
};

float to_float(float value) { return value; }

float to_float(bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

template <class T>
T from_float(float value);

template <>
float from_float<float>(float value) {
    return value;
}

// To nearest, ties to even.
template <>
bf16 from_float<bf16>(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return {static_cast<unsigned short>(bits >> 16 | 0x40u)};
    return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

size_t first() { return static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

size_t step() { return static_cast<size_t>(blockDim.x) * gridDim.x; }

// Where entry `idx` of a tensor lies; without dimensions, one behind the other.
size_t place(size_t idx, size_t num_dims, const size_t* dims, const size_t* strides) {
    if (dims == nullptr) return idx;
    size_t at = 0;
    for (size_t dim = num_dims; dim-- > 0;) {
        at += idx % dims[dim] * strides[dim];
        idx /= dims[dim];
    }
    return at;
}

template <class From, class To, class Function>
void map(size_t len, size_t num_dims, const size_t* info, const From* x, To* out, Function function) {
    for (size_t i = first(); i < len; i += step()) out[i] = function(x[place(i, num_dims, info, info + num_dims)]);
}

template <class T, class Function>
void zip(size_t len, size_t num_dims, const size_t* info, const T* a, const T* b, T* out, Function function) {
    for (size_t i = first(); i < len; i += step()) {
        const float left = to_float(a[place(i, num_dims, info, info + num_dims)]);
        const float right = to_float(b[place(i, num_dims, info, info + 2 * num_dims)]);
        out[i] = from_float<T>(function(left, right));
    }
}

}  // namespace

#define COPY(name, T)                                                                                     \
    static void ucopy_##name(size_t len, size_t num_dims, const size_t* info, const T* x, T* out) {       \
        map(len, num_dims, info, x, out, [](T value) { return value; });                                  \
    }                                                                                                     \
    EXPORT_KERNEL(ucopy_##name)                                                                           \
    static void copy2d_##name(const T* x, T* out, unsigned rows, unsigned width, unsigned x_stride,       \
                              unsigned out_stride) {                                                      \
        for (size_t i = first(); i < static_cast<size_t>(rows) * width; i += step())                      \
            out[i / width * out_stride + i % width] = x[i / width * x_stride + i % width];                \
    }                                                                                                     \
    EXPORT_KERNEL(copy2d_##name)                                                                          \
    static void const_set_##name(size_t len, size_t num_dims, const size_t* info, T value, T* out) {      \
        for (size_t i = first(); i < len; i += step()) out[place(i, num_dims, info, info + num_dims)] = value; \
    }                                                                                                     \
    EXPORT_KERNEL(const_set_##name)                                                                       \
    static void is_u32_##name(size_t len, size_t num_dims, const size_t* info, const unsigned* ids, const T* x, T* out, \
                              size_t left, size_t num_rows, size_t num_ids, size_t right) {               \
        (void)num_dims, (void)info, (void)left;                                                           \
        for (size_t i = first(); i < len; i += step()) {                                                  \
            const size_t row = ids[i / right % num_ids];                                                  \
            if (row >= num_rows) std::abort();                                                            \
            out[i] = x[(i / (num_ids * right) * num_rows + row) * right + i % right];                     \
        }                                                                                                 \
    }                                                                                                     \
    EXPORT_KERNEL(is_u32_##name)

#define BINARY(op, name, T, result)                                                                              \
    static void op##_##name(size_t len, size_t num_dims, const size_t* info, const T* a, const T* b, T* out) {   \
        zip(len, num_dims, info, a, b, out, [](float x, float y) { return result; });                            \
    }                                                                                                            \
    EXPORT_KERNEL(op##_##name)

#define ARITHMETIC(name, T)                                                                                    \
    BINARY(badd, name, T, x + y)                                                                               \
    BINARY(bsub, name, T, x - y)                                                                               \
    BINARY(bmul, name, T, x * y)                                                                               \
    BINARY(bdiv, name, T, x / y)                                                                               \
    BINARY(bmaximum, name, T, x > y || x != x ? x : y)                                                         \
    BINARY(bminimum, name, T, x < y || x != x ? x : y)                                                         \
    static void affine_##name(size_t len, size_t num_dims, const size_t* info, const T* x, T* out, T mul, T add) { \
        map(len, num_dims, info, x, out, [=](T value) {                                                        \
            return from_float<T>(to_float(from_float<T>(to_float(value) * to_float(mul))) + to_float(add));    \
        });                                                                                                    \
    }                                                                                                          \
    EXPORT_KERNEL(affine_##name)

#define CAST(from, From, to, To)                                                                                      \
    static void cast_##from##_##to(size_t len, size_t num_dims, const size_t* info, const From* x, To* out) {         \
        map(len, num_dims, info, x, out, [](From value) { return from_float<To>(to_float(value)); });                 \
    }                                                                                                                 \
    EXPORT_KERNEL(cast_##from##_##to)

COPY(f32, float)
COPY(bf16, bf16)
COPY(u32, unsigned)
ARITHMETIC(f32, float)
ARITHMETIC(bf16, bf16)
CAST(f32, float, bf16, bf16)
CAST(bf16, bf16, f32, float)
CAST(f32, float, f32, float)
CAST(bf16, bf16, bf16, bf16)
