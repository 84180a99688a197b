// Forward pass and input gradient without shared memory: any Gather, however odd.
//
// A thread computes one output at a time. Outputs are numbered so that the lanes of a
// warp hold neighbouring pixels of one phase and one channel: they walk one row together.

#include "prelude.cuh"
#include "gather.cuh"
#include "epilogue.cuh"

struct Arguments {
    const Storage* read;
    const Storage* values;
    const int* begin;
    const int* end;
    const int* indices;
    const int* order;
    const Storage* bias;
    const int* origins;
    Storage* write;
    // Outputs of one channel, counting those that a phase lacks beside the largest.
    long long pixels;
    Geometry geometry;
    // Outputs of the largest phase.
    int phase_outputs_h;
    int phase_outputs_w;
    int activation;
};

__device__ __forceinline__ Accumulator sum_row(
    const Arguments& a, int row, const Storage* read, long long y, long long x) {
    const Geometry& geometry = a.geometry;
    const int end = __ldg(a.end + row);
    Accumulator sum = 0;
    for (int batch = __ldg(a.begin + row); batch < end; batch += WARP) {
        const int batch_end = min(end - batch, WARP) + batch;
        Accumulator partial = 0;
#pragma unroll 4
        for (int i = batch; i < batch_end; ++i) {
            const int index = __ldg(a.indices + i);
            const int line = divide(index, geometry.by_taps_w);
            const int channel = divide(line, geometry.by_taps_h);
            const long long tap_w = index - line * geometry.w.taps;
            const long long tap_h = line - channel * geometry.h.taps;
            const long long input_y = y + tap_h * geometry.h.step;
            const long long input_x = x + tap_w * geometry.w.step;
            // Without short circuits, so that the reads of several entries overlap.
            const bool exists = (input_y >= 0) & (input_y < geometry.h.inputs) &
                                (input_x >= 0) & (input_x < geometry.w.inputs);
            const Storage* place = read + input_y * geometry.read.row +
                                   input_x * geometry.read.column +
                                   channel * geometry.read.channel;
            Accumulator number = 0;
            if (exists) number = to_accumulator(__ldg(place));
            const Accumulator value =
                to_accumulator(__ldg(a.values + (a.order ? __ldg(a.order + i) : i)));
            partial = multiply_add(value, number, partial);
        }
        sum += partial;
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(256) conv2d_gather_direct(const Arguments a) {
    const Geometry& geometry = a.geometry;
    const long long outputs = a.pixels * geometry.out_channels;
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long number = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
         number < outputs; number += threads) {
        const int channel = static_cast<int>(number / a.pixels);
        long long rest = number % a.pixels;
        const int i_w = static_cast<int>(rest % a.phase_outputs_w);
        rest /= a.phase_outputs_w;
        const int i_h = static_cast<int>(rest % a.phase_outputs_h);
        rest /= a.phase_outputs_h;
        const int phase_w = static_cast<int>(rest % geometry.w.visited);
        rest /= geometry.w.visited;
        const int phase_h = static_cast<int>(rest % geometry.h.visited);
        const long long image = rest / geometry.h.visited;
        if (outputs_left(geometry.h, phase_h, i_h) <= 0) continue;
        if (outputs_left(geometry.w, phase_w, i_w) <= 0) continue;

        const long long y = read_origin(__ldg(a.origins + phase_h), geometry.h, i_h);
        const long long x =
            read_origin(__ldg(a.origins + geometry.h.visited + phase_w), geometry.w, i_w);
        const int set = phase_h % geometry.h.row_sets * geometry.w.row_sets +
                        phase_w % geometry.w.row_sets;
        const int first_input = channel / geometry.group_out * geometry.group_in;
        const Storage* read = a.read + image * geometry.read.image +
                              first_input * geometry.read.channel;
        Accumulator sum = sum_row(a, set * geometry.out_channels + channel, read, y, x);
        if (a.bias) sum += to_accumulator(__ldg(a.bias + channel));

        const Pitch& pitch = geometry.write;
        const long long out_y = phase_h + static_cast<long long>(geometry.h.phases) * i_h;
        const long long out_x = phase_w + static_cast<long long>(geometry.w.phases) * i_w;
        a.write[image * pitch.image + out_y * pitch.row + out_x * pitch.column +
                channel * pitch.channel] = to_storage(activate(sum, a.activation));
    }
}
