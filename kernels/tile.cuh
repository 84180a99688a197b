// Tiles in shared memory: what several subtiles read, interleaved pixel by pixel.
//
// A block works on SLOTS subtiles at once. A subtile is a rectangle of outputs of one
// image and one phase; what it reads is a rectangle of the phase's lattice (its inputs,
// `step` apart). A tile keeps, for each channel of a chunk and each lattice position, one
// Pack: the inputs of all slots. One tap of all subtiles is then one aligned 16-byte read.
//
// Lattice column x lies at `(x % stride) * columns + x / stride`, so that neighbouring
// outputs read neighbouring Packs, free of bank conflicts, for every stride.

#pragma once

#include "gather.cuh"

// The shape of a tile; pitches in Packs.
struct Lattice {
    int extent_h;
    int extent_w;
    int columns;
    int row_pitch;
    int plane_pitch;
    Divisor by_channels;
    Divisor by_extent_h;
    Divisor by_extent_w;
    Divisor by_stride_w;
};

// What a slot reads or writes: where lattice position (0, 0) of the first channel would
// lie, and the rectangle of the lattice that exists. Nothing else may be touched.
struct alignas(16) Window {
    int y_begin;
    int y_count;
    int x_begin;
    int x_count;
    const Storage* origin;
    long long offset;
};

// Elements from a lattice position to the next, in what is read and in what is written.
// They fit 32 bits wherever tiles are used, so that one instruction multiplies them.
struct Steps {
    int read_row;
    int read_column;
    int read_channel;
    int write_row;
    int write_column;
    int write_channel;
};

__device__ __forceinline__ long long widening(int a, int b) {
    return static_cast<long long>(a) * b;
}

// How the outputs of a kernel's subtiles are numbered.
struct Tiling {
    int tile_h;
    int tile_w;
    Divisor by_tiles_h;
    Divisor by_tiles_w;
    // Over the phases of one row set, at most.
    Divisor by_set_phases_h;
    Divisor by_set_phases_w;
    Divisor by_tile_w;
};

// The coordinates t in [0, extent) with 0 <= origin + step * t < size. The plan sees to
// it that none of these numbers needs more than 31 bits.
__device__ __forceinline__ void existing(
    int origin, const Divisor& by_step, int size, int extent, int& begin, int& count) {
    const int first = origin < 0 ? divide(by_step.divisor - 1 - origin, by_step) : 0;
    int last = origin < size ? divide(size - 1 - origin, by_step) + 1 : 0;
    if (last > extent) last = extent;
    begin = first < last ? first : 0;
    count = first < last ? last - first : 0;
}

// Finds subtile number `number` of a pair of row sets; false if its phase has no outputs.
__device__ __forceinline__ bool find_subtile(
    int number, int set_h, int set_w, const Geometry& geometry, const Tiling& tiling,
    Subtile& found) {
    found.i_w = divide_on(number, tiling.by_tiles_w) * tiling.tile_w;
    found.i_h = divide_on(number, tiling.by_tiles_h) * tiling.tile_h;
    found.phase_w =
        divide_on(number, tiling.by_set_phases_w) * geometry.w.row_sets + set_w;
    found.phase_h =
        divide_on(number, tiling.by_set_phases_h) * geometry.h.row_sets + set_h;
    found.image = number;
    return found.phase_h < geometry.h.visited && found.phase_w < geometry.w.visited;
}

__device__ __forceinline__ Window empty_window() {
    Window window = {0, 0, 0, 0, nullptr, 0};
    return window;
}

// What a subtile reads of the input: a rectangle of these extents, from what its phases
// read first on. `channel` is its group's first.
__device__ __forceinline__ Window input_window(
    const Storage* read, const Subtile& subtile, int channel, const Geometry& geometry,
    int extent_h, int extent_w, int origin_h, int origin_w) {
    const int y = origin_h + geometry.h.step * geometry.h.stride * subtile.i_h;
    const int x = origin_w + geometry.w.step * geometry.w.stride * subtile.i_w;
    Window window = empty_window();
    existing(y, geometry.h.by_step, geometry.h.inputs, extent_h, window.y_begin,
             window.y_count);
    existing(x, geometry.w.by_step, geometry.w.inputs, extent_w, window.x_begin,
             window.x_count);
    const Pitch& pitch = geometry.read;
    window.offset = subtile.image * pitch.image + y * pitch.row + x * pitch.column +
                    channel * pitch.channel;
    window.origin = read + window.offset;
    return window;
}

// A subtile's own outputs, in `memory`.
__device__ __forceinline__ Window output_window(
    const Storage* memory, const Subtile& subtile, const Geometry& geometry, const Tiling& tiling) {
    const int y = subtile.phase_h + geometry.h.phases * subtile.i_h;
    const int x = subtile.phase_w + geometry.w.phases * subtile.i_w;
    Window window = empty_window();
    existing(y, geometry.h.by_phases, geometry.h.outputs, tiling.tile_h, window.y_begin,
             window.y_count);
    existing(x, geometry.w.by_phases, geometry.w.outputs, tiling.tile_w, window.x_begin,
             window.x_count);
    const Pitch& pitch = geometry.write;
    window.offset = subtile.image * pitch.image + y * pitch.row + x * pitch.column;
    window.origin = memory + window.offset;
    return window;
}

__device__ __forceinline__ bool contains(const Window& window, int y, int x) {
    // Without a short circuit: two comparisons are cheaper than a branch.
    return (static_cast<unsigned>(y - window.y_begin) <
            static_cast<unsigned>(window.y_count)) &
           (static_cast<unsigned>(x - window.x_begin) <
            static_cast<unsigned>(window.x_count));
}

// Lattice positions that a thread loads at a time, so that several reads are in flight.
#ifndef LOADS
#define LOADS 3
#endif

// Loads `channels` channels from `first_channel` on of every slot; all threads take part.
// Neighbouring threads read neighbouring memory: channels first if `channels_last`.
__device__ __forceinline__ void load_tile(
    Pack* tile, const Window* windows, const Lattice& lattice, int row, int column,
    int channel_step, bool channels_last, int first_channel, int channels) {
    const int area = lattice.extent_h * lattice.extent_w;
    const int places = area * (channels_last ? lattice.by_channels.divisor : channels);
    for (int first = threadIdx.x; first < places; first += LOADS * blockDim.x) {
        Accumulator numbers[LOADS][SLOTS];
        long long offset[LOADS];
        int y[LOADS];
        int x[LOADS];
        int target[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; ++u) {
            const int place = first + u * blockDim.x;
            int channel;
            if (channels_last) {
                const int position = divide(place, lattice.by_channels);
                channel = place - position * lattice.by_channels.divisor;
                y[u] = divide(position, lattice.by_extent_w);
                x[u] = position - y[u] * lattice.extent_w;
            } else {
                const int line = divide(place, lattice.by_extent_w);
                x[u] = place - line * lattice.extent_w;
                channel = divide(line, lattice.by_extent_h);
                y[u] = line - channel * lattice.extent_h;
            }
            const int quotient = divide(x[u], lattice.by_stride_w);
            const int remainder = x[u] - quotient * lattice.by_stride_w.divisor;
            const bool wanted = place < places && channel < channels;
            target[u] = wanted ? channel * lattice.plane_pitch + y[u] * lattice.row_pitch +
                                     remainder * lattice.columns + quotient
                               : -1;
            offset[u] = widening(y[u], row) + widening(x[u], column) +
                        widening(first_channel + channel, channel_step);
        }
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const Window window = windows[slot];
#pragma unroll
            for (int u = 0; u < LOADS; ++u) {
                numbers[u][slot] = 0;
                if ((target[u] >= 0) & contains(window, y[u], x[u])) {
                    numbers[u][slot] = to_accumulator(__ldg(window.origin + offset[u]));
                }
            }
        }
#pragma unroll
        for (int u = 0; u < LOADS; ++u) {
            if (target[u] >= 0) tile[target[u]] = make_pack(numbers[u]);
        }
    }
}

// The place in the tile, in Packs, of the entry with this index, for the output at the
// subtile's corner. `first_channel` is the chunk's first.
__device__ __forceinline__ int entry_offset(
    int index, int first_channel, const Geometry& geometry, const Lattice& lattice) {
    const int line = divide(index, geometry.by_taps_w);
    const int tap_w = index - line * geometry.w.taps;
    const int channel = divide(line, geometry.by_taps_h);
    const int tap_h = line - channel * geometry.h.taps;
    const int quotient = divide(tap_w, lattice.by_stride_w);
    const int remainder = tap_w - quotient * lattice.by_stride_w.divisor;
    return (channel - first_channel) * lattice.plane_pitch + tap_h * lattice.row_pitch +
           remainder * lattice.columns + quotient;
}
