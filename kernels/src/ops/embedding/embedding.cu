// One block of ROW_THREADS for each token.

#include "device.cuh"

// ids: [num_tokens], all in the table; table: [vocab_size, width], out: [num_tokens, width]
template <class Stored, class T>
static __device__ void embedding(const unsigned* ids, const Stored* table, T* out, int width) {
    const Stored* row = table + static_cast<size_t>(ids[blockIdx.x]) * width;
    for (int i = threadIdx.x; i < width; i += ROW_THREADS)
        out[static_cast<size_t>(blockIdx.x) * width + i] = from_float<T>(to_float(row[i]));
}

#define KERNEL(Stored, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                  \
        embedding_##Stored##_##T(const unsigned* ids, const Stored* table, T* out, int width) {                \
        embedding<Stored, T>(ids, table, out, width);                                                          \
    }                                                                                                          \
    EXPORT_KERNEL(embedding_##Stored##_##T)

KERNEL(float, float)
KERNEL(f16, float)
KERNEL(bf16, float)
KERNEL(float, bf16)
KERNEL(f16, bf16)
KERNEL(bf16, bf16)
