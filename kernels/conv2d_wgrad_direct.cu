// Gradient to the kernel, first half, without shared memory: any Gather, however odd.
//
// A block takes one row and a part of the outputs. Its warps take SUMS entries of the row
// at a time, the lanes neighbouring outputs.

#include "prelude.cuh"
#include "gather.cuh"
#include "reduce.cuh"

struct Arguments {
    const Storage* read;
    const Storage* gradient;
    const int* begin;
    const int* end;
    const int* indices;
    const int* origins;
    Accumulator* workspace;
    // Outputs of one channel, counting those that a phase lacks beside the largest.
    long long pixels;
    long long entries;
    Geometry geometry;
    // Outputs of the largest phase.
    int phase_outputs_h;
    int phase_outputs_w;
    int splits;
};

// What SUMS entries read, relative to tap (0, 0) of channel 0.
struct Taps {
    long long y[SUMS];
    long long x[SUMS];
    long long channel[SUMS];
};

__device__ __forceinline__ Taps find_taps(const Arguments& a, int first, int count) {
    const Geometry& geometry = a.geometry;
    Taps taps;
#pragma unroll
    for (int e = 0; e < SUMS; ++e) {
        const int entry = first + min(e, count - 1);
        const int index = a.indices ? __ldg(a.indices + entry) : entry;
        const int line = divide(index, geometry.by_taps_w);
        const int channel = divide(line, geometry.by_taps_h);
        taps.x[e] = static_cast<long long>(index - line * geometry.w.taps) * geometry.w.step;
        taps.y[e] =
            static_cast<long long>(line - channel * geometry.h.taps) * geometry.h.step;
        taps.channel[e] = channel * geometry.read.channel;
    }
    return taps;
}

// Adds one output's products; `pixel` numbers the outputs of a channel.
__device__ __forceinline__ void add_output(
    const Arguments& a, long long pixel, int group, int row, const Taps& taps, int count,
    Accumulator (&sums)[SUMS]) {
    const Geometry& geometry = a.geometry;
    const int i_w = static_cast<int>(pixel % a.phase_outputs_w);
    pixel /= a.phase_outputs_w;
    const int i_h = static_cast<int>(pixel % a.phase_outputs_h);
    pixel /= a.phase_outputs_h;
    const int phase_w = static_cast<int>(pixel % geometry.w.visited);
    pixel /= geometry.w.visited;
    const int phase_h = static_cast<int>(pixel % geometry.h.visited);
    const long long image = pixel / geometry.h.visited;
    if (outputs_left(geometry.h, phase_h, i_h) <= 0) return;
    if (outputs_left(geometry.w, phase_w, i_w) <= 0) return;

    const long long out_y = phase_h + static_cast<long long>(geometry.h.phases) * i_h;
    const long long out_x = phase_w + static_cast<long long>(geometry.w.phases) * i_w;
    const Accumulator gradient = to_accumulator(__ldg(
        a.gradient + image * geometry.write.image + out_y * geometry.write.row +
        out_x * geometry.write.column + row * geometry.write.channel));
    const long long y = read_origin(__ldg(a.origins + phase_h), geometry.h, i_h);
    const long long x =
        read_origin(__ldg(a.origins + geometry.h.visited + phase_w), geometry.w, i_w);
    const Storage* read = a.read + image * geometry.read.image +
                          static_cast<long long>(group) * geometry.group_in *
                              geometry.read.channel;
#pragma unroll
    for (int e = 0; e < SUMS; ++e) {
        const long long input_y = y + taps.y[e];
        const long long input_x = x + taps.x[e];
        const bool exists = e < count && input_y >= 0 && input_y < geometry.h.inputs &&
                            input_x >= 0 && input_x < geometry.w.inputs;
        if (exists) {
            const Accumulator number = to_accumulator(
                __ldg(read + input_y * geometry.read.row + input_x * geometry.read.column +
                      taps.channel[e]));
            sums[e] = multiply_add(number, gradient, sums[e]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) conv2d_wgrad_direct(const Arguments a) {
    const Geometry& geometry = a.geometry;
    const int lane = threadIdx.x % WARP;
    const int row = blockIdx.x / a.splits;
    const int split = blockIdx.x % a.splits;
    const int group = row / geometry.group_out;
    const int row_length = geometry.group_in * geometry.h.taps * geometry.w.taps;
    const int begin = a.indices ? __ldg(a.begin + row) : 0;
    const int end = a.indices ? __ldg(a.end + row) : row_length;
    const long long dense = static_cast<long long>(row) * row_length;
    Accumulator* workspace =
        a.workspace + split * a.entries + (a.indices ? 0 : dense);

    const int warps = blockDim.x / WARP;
    for (int first = begin + threadIdx.x / WARP * SUMS; first < end;
         first += warps * SUMS) {
        const int count = min(end - first, SUMS);
        const Taps taps = find_taps(a, first, count);
        Accumulator sums[SUMS] = {};
        for (long long pixel = static_cast<long long>(split) * WARP + lane;
             pixel < a.pixels; pixel += static_cast<long long>(a.splits) * WARP) {
            add_output(a, pixel, group, row, taps, count, sums);
        }
        __syncwarp();
        const Accumulator sum = sum_over_lanes(sums);
        const int entry = lane / LANES_PER_SUM;
        if (lane % LANES_PER_SUM == 0 && entry < count) workspace[first + entry] = sum;
    }
}
