// The geometry of a Gather, as every function receives it.
//
// Along one axis, output `phase + phases * i` reads the inputs
// `origins[phase] + step * (i * stride + tap)`. Sparse row
// `(set_h * row_sets_w + set_w) * out_channels + out_channel` belongs to the phases that
// are congruent to the set, modulo the number of sets. An entry's index is
// `(channel * taps_h + tap_h) * taps_w + tap_w`.

#pragma once

#include "prelude.cuh"

struct Axis {
    int inputs;
    int outputs;
    int phases;
    // How many phases have outputs, and so an origin.
    int visited;
    int row_sets;
    int step;
    int stride;
    int taps;
    Divisor by_phases;
    Divisor by_step;
};

// Distances between neighbours in memory, in elements.
struct Pitch {
    long long image;
    long long row;
    long long column;
    long long channel;
};

struct Geometry {
    Pitch read;
    Pitch write;
    int group_in;
    int group_out;
    int out_channels;
    // Whether a pixel's channels are neighbours in memory.
    int channels_last;
    Axis h;
    Axis w;
    Divisor by_taps_h;
    Divisor by_taps_w;
};

// Where one output pixel is found: its image, its phase and its place in the phase.
struct Subtile {
    int image;
    int phase_h;
    int phase_w;
    int i_h;
    int i_w;
};

__device__ __forceinline__ long long read_origin(int origin, const Axis& axis, int i) {
    return origin + static_cast<long long>(axis.step) * axis.stride * i;
}

// How many outputs of `phase` lie at or behind its output `i`; not positive if none.
__device__ __forceinline__ int outputs_left(const Axis& axis, int phase, int i) {
    const long long first = phase + static_cast<long long>(axis.phases) * i;
    return static_cast<int>((axis.outputs - first + axis.phases - 1) / axis.phases);
}
