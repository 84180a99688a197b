// Gradient to the kernel, first half: for each entry a sum of input times gradient over a
// part of the outputs. `sum_partials` adds the parts.
//
// A block takes every `splits`-th group of SLOTS subtiles, and some rows. The tiles of
// the input (a chunk of channels) and of the gradient (the block's rows) lie in shared
// memory, see tile.cuh. A warp takes its rows one after another: a lane keeps the row's
// gradient at its pixels in registers and walks the row's entries. Each entry belongs to
// one warp, which adds to the entry's place in the workspace: no atomics, one order.
// Without `indices` every weight is an entry.

#include "prelude.cuh"
#include "gather.cuh"
#include "tile.cuh"
#include "reduce.cuh"

#ifndef POSITIONS
#define POSITIONS 4
#endif

struct Arguments {
    const Storage* read;
    const Storage* gradient;
    const int* begin;
    const int* end;
    const int* indices;
    const int* origins;
    Accumulator* workspace;
    long long entries;
    Geometry geometry;
    Tiling tiling;
    int subtiles;
    Lattice lattice;
    Lattice outputs;
    int chunk;
    int chunks;
    int row_groups;
    int subtile_groups;
    int splits;
    int warp_rows;
    Steps steps;
};

struct Shared {
    Window* inputs;
    Window* outputs;
    int* offsets;
    Pack* tile;
    Pack* gradient;
};

// A lane's pixels: their places in both tiles, and which of them exist.
struct Pixels {
    int input[POSITIONS];
    int output[POSITIONS];
    unsigned exist;
};

__device__ __forceinline__ Shared divide_shared_memory(const Arguments& a, char* memory) {
    Shared shared;
    shared.inputs = reinterpret_cast<Window*>(memory);
    shared.outputs = shared.inputs + SLOTS;
    shared.offsets = reinterpret_cast<int*>(shared.outputs + SLOTS);
    shared.tile = reinterpret_cast<Pack*>(shared.offsets + blockDim.x);
    shared.gradient = shared.tile + a.chunk * a.lattice.plane_pitch;
    return shared;
}

__device__ __forceinline__ void find_windows(
    const Arguments& a, const Shared& shared, int subtile_group, int first_input) {
    if (threadIdx.x >= SLOTS) return;
    const int slot = threadIdx.x;
    shared.inputs[slot] = empty_window();
    shared.outputs[slot] = empty_window();
    Subtile subtile;
    const int number = subtile_group * SLOTS + slot;
    if (number < a.subtiles &&
        find_subtile(number, 0, 0, a.geometry, a.tiling, subtile)) {
        shared.inputs[slot] =
            input_window(a.read, subtile, first_input, a.geometry, a.lattice.extent_h,
                         a.lattice.extent_w, __ldg(a.origins + subtile.phase_h),
                         __ldg(a.origins + a.geometry.h.visited + subtile.phase_w));
        shared.outputs[slot] = output_window(a.gradient, subtile, a.geometry, a.tiling);
    }
}

__device__ __forceinline__ Pixels find_pixels(const Arguments& a, const Shared& shared) {
    Pixels pixels;
    pixels.exist = 0;
#pragma unroll
    for (int j = 0; j < POSITIONS; ++j) {
        const int position = j * WARP + threadIdx.x % WARP;
        const int y = divide(position, a.tiling.by_tile_w);
        const int x = position - y * a.tiling.tile_w;
        const bool inside = y < a.tiling.tile_h;
        pixels.input[j] =
            inside ? y * a.geometry.h.stride * a.lattice.row_pitch + x : 0;
        pixels.output[j] = inside ? y * a.outputs.row_pitch + x : 0;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            if (inside & contains(shared.outputs[slot], y, x)) {
                pixels.exist |= 1u << (j * SLOTS + slot);
            }
        }
    }
    return pixels;
}

// Sums of up to SUMS entries over the lane's pixels. Where there is no output its
// gradient is 0, but an infinite input would still give NaN: hence WHOLE.
template <bool WHOLE>
__device__ __forceinline__ void multiply(
    const Shared& shared, const int* offsets, int count, const Pixels& pixels,
    const Accumulator (&gradient)[POSITIONS][SLOTS], Accumulator (&sums)[SUMS]) {
#pragma unroll
    for (int e = 0; e < SUMS; ++e) {
        sums[e] = 0;
        if (e >= count) continue;
        const int offset = offsets[e];
#pragma unroll
        for (int j = 0; j < POSITIONS; ++j) {
            Accumulator numbers[SLOTS];
            unpack(shared.tile[pixels.input[j] + offset], numbers);
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                const bool exists = WHOLE || (pixels.exist >> (j * SLOTS + slot) & 1u);
                sums[e] = multiply_add(
                    exists ? numbers[slot] : 0, gradient[j][slot], sums[e]);
            }
        }
    }
}

// Adds a row's entries below index `limit` to the workspace, from `cursor` on; returns
// where it stopped.
__device__ __forceinline__ int add_row(
    const Arguments& a, const Shared& shared, int* offsets, Accumulator* workspace,
    bool fresh, const Pixels& pixels, const Accumulator (&gradient)[POSITIONS][SLOTS],
    int cursor, int end, int limit, int first_input) {
    const int lane = threadIdx.x % WARP;
    const bool whole =
        __ballot_sync(FULL_MASK, pixels.exist == (1u << (POSITIONS * SLOTS)) - 1u) ==
        FULL_MASK;
    while (cursor < end) {
        const int mine = cursor + lane;
        int index = limit;
        if (mine < end) index = a.indices ? __ldg(a.indices + mine) : mine;
        const bool wanted = index < limit;
        const int count = __popc(__ballot_sync(FULL_MASK, wanted));
        if (wanted) offsets[lane] = entry_offset(index, first_input, a.geometry, a.lattice);
        __syncwarp();
#pragma unroll 1
        for (int first = 0; first < count; first += SUMS) {
            Accumulator sums[SUMS];
            if (whole) {
                multiply<true>(shared, offsets + first, count - first, pixels, gradient, sums);
            } else {
                multiply<false>(shared, offsets + first, count - first, pixels, gradient, sums);
            }
            const Accumulator sum = sum_over_lanes(sums);
            const int entry = first + lane / LANES_PER_SUM;
            if (lane % LANES_PER_SUM == 0 && entry < count) {
                Accumulator* place = workspace + cursor + entry;
                *place = fresh ? sum : *place + sum;
            }
        }
        cursor += count;
        __syncwarp();
        if (count < WARP) break;
    }
    return cursor;
}

extern "C" __global__ void __launch_bounds__(256, 2) conv2d_wgrad(const Arguments a) {
    SHARED_MEMORY(memory);
    const Shared shared = divide_shared_memory(a, memory);
    const Geometry& geometry = a.geometry;
    const int warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;

    const int block_rows = blockDim.x / WARP * a.warp_rows;
    const int split = blockIdx.x / a.row_groups;
    const int row_group = blockIdx.x % a.row_groups;
    const int group_blocks = (geometry.group_out + block_rows - 1) / block_rows;
    const int group = row_group / group_blocks;
    const int row_in_group = row_group % group_blocks * block_rows;
    const int channels = min(block_rows, geometry.group_out - row_in_group);
    const int first_channel = group * geometry.group_out + row_in_group;
    const int first_row = warp * a.warp_rows;
    const int rows = max(0, min(a.warp_rows, channels - first_row));
    const int row_length = geometry.group_in * geometry.h.taps * geometry.w.taps;
    Accumulator* workspace = a.workspace + split * a.entries;

    // Lane r keeps the state of the warp's row r.
    int begin = 0;
    int end = 0;
    if (lane < rows) {
        const int row = first_channel + first_row + lane;
        begin = a.indices ? __ldg(a.begin + row) : 0;
        end = a.indices ? __ldg(a.end + row) : row_length;
    }

    for (int number = split; number < a.subtile_groups; number += a.splits) {
        __syncthreads();
        find_windows(a, shared, number, group * geometry.group_in);
        __syncthreads();
        load_tile(shared.gradient, shared.outputs, a.outputs, a.steps.write_row,
                  a.steps.write_column, a.steps.write_channel, a.geometry.channels_last,
                  first_channel, channels);
        const Pixels pixels = find_pixels(a, shared);
        int cursor = begin;
        for (int chunk = 0; chunk < a.chunks; ++chunk) {
            const int first_input = chunk * a.chunk;
            const int inputs = min(a.chunk, geometry.group_in - first_input);
            const int limit = (first_input + inputs) * geometry.h.taps * geometry.w.taps;
            if (chunk > 0) __syncthreads();
            load_tile(shared.tile, shared.inputs, a.lattice, a.steps.read_row,
                      a.steps.read_column, a.steps.read_channel, a.geometry.channels_last,
                      first_input, inputs);
            __syncthreads();
#pragma unroll 1
            for (int r = 0; r < rows; ++r) {
                const Pack* row = shared.gradient + (first_row + r) * a.outputs.plane_pitch;
                Accumulator gradient[POSITIONS][SLOTS];
#pragma unroll
                for (int j = 0; j < POSITIONS; ++j) {
                    unpack(row[pixels.output[j]], gradient[j]);
#pragma unroll
                    for (int slot = 0; slot < SLOTS; ++slot) {
                        // A position behind the tile's end reads what isn't its own.
                        if (!(pixels.exist >> (j * SLOTS + slot) & 1u)) gradient[j][slot] = 0;
                    }
                }
                const long long dense =
                    static_cast<long long>(first_channel + first_row + r) * row_length;
                const int stopped = add_row(
                    a, shared, shared.offsets + warp * WARP,
                    workspace + (a.indices ? 0 : dense), number == split, pixels, gradient,
                    __shfl_sync(FULL_MASK, cursor, r), __shfl_sync(FULL_MASK, end, r), limit,
                    first_input);
                if (lane == r) cursor = stopped;
            }
        }
    }
}
