// One block of ROW_THREADS for each row.

#include "device.cuh"

// values: [rows, width]; out: [rows], NONE where nothing is above minus infinity. A NaN counts for nothing.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) argmax_float(const float* values, unsigned* out, int width) {
    SHARED(Best, scratch, ROW_WARPS);
    const float* row = values + static_cast<size_t>(blockIdx.x) * width;
    Best best = {0, NONE};
    for (int i = threadIdx.x; i < width; i += ROW_THREADS)
        if (row[i] > -INFINITY) best = better(best, {row[i], static_cast<unsigned>(i)});
    best = row_best(best, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = best.index;
}
EXPORT_KERNEL(argmax_float)
