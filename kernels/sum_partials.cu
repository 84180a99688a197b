// Gradient to the kernel, second half: adds the partial sums of each entry, in order.
//
// The result is in the entries' order, or, if every weight is an entry, an HWIO kernel.

#include "prelude.cuh"

struct Arguments {
    const Accumulator* workspace;
    Storage* write;
    long long entries;
    int splits;
    int dense;
    int rows;
    int row_channels;
    int taps;
};

#if DTYPE == INT32
typedef unsigned Total;
#else
typedef double Total;
#endif

extern "C" __global__ void __launch_bounds__(256) sum_partials(const Arguments a) {
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long entry = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
         entry < a.entries; entry += threads) {
        Total total = 0;
#pragma unroll 4
        for (int split = 0; split < a.splits; ++split) {
            total += __ldg(a.workspace + split * a.entries + entry);
        }
        long long place = entry;
        if (a.dense) {
            const long long row_length = static_cast<long long>(a.row_channels) * a.taps;
            const long long row = entry / row_length;
            const long long index = entry % row_length;
            place = (index % a.taps * a.row_channels + index / a.taps) * a.rows + row;
        }
        a.write[place] = to_storage(static_cast<Accumulator>(total));
    }
}
