// Entries of sparse rows in the order in which conv2d_spmm.cu copies them: those that a
// block needs for a chunk of channels lie together, and behind them the spans of its rows.
//
// The host has found where each lies and what it reads (see spmm.py). What is brought here
// are the values of now.

#include "prelude.cuh"
#include "spmm_entries.cuh"

#define THREADS 256

struct Arguments {
    const Storage* values;
    // By quads of entries: which values they have, negative where there is no entry, and
    // where they read.
    const int* sources;
    const int* offsets;
    const Piece* spans;
    Piece* write;
    long long count;
    // Quads of entries of a block and a chunk, and pieces of spans.
    int quads;
    int span_pieces;
};

__device__ __forceinline__ void write_quad(const Arguments& a, long long quad, Entries* to) {
    Entries entries;
#pragma unroll
    for (int k = 0; k < QUAD; ++k) {
        const int source = __ldg(a.sources + quad * QUAD + k);
        entries.offsets[k] = __ldg(a.offsets + quad * QUAD + k);
        entries.weights[k] = source < 0 ? Accumulator(0) : to_accumulator(__ldg(a.values + source));
    }
    *to = entries;
}

extern "C" __global__ void __launch_bounds__(THREADS) place_entries(const Arguments a) {
    const long long number = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (number >= a.count) return;
    const int units = a.quads + a.span_pieces;
    const long long part = number / units;
    const int unit = static_cast<int>(number - part * units);
    const int pieces_of_quads = a.quads * static_cast<int>(sizeof(Entries) / sizeof(Piece));
    Piece* write = a.write + part * (pieces_of_quads + a.span_pieces);
    if (unit < a.quads) {
        write_quad(a, part * a.quads + unit, reinterpret_cast<Entries*>(write) + unit);
    } else {
        const int piece = unit - a.quads;
        write[pieces_of_quads + piece] = a.spans[part * a.span_pieces + piece];
    }
}
