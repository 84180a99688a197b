// Forward pass and input gradient for one kernel, whose pattern and values are code.
//
// Every thread computes OUTPUTS channels of one pixel. For each input that it reads, there
// is one instruction for each nonzero weight of that input, with the weight as its
// immediate operand: nothing is decoded and no zero is visited. The instructions are
// generated (see baked_code.cuh); this text is what surrounds them: it brings tiles of the
// input into shared memory, a chunk of channels ahead of the computation, and stores.
//
// The idea of weights as operands of straight-line code is SparseRT's (Z. Wang,
// https://arxiv.org/abs/2008.11849).

#ifndef MANY_CHUNKS
// Whether the channels come in several chunks; compiled in, because the loop costs
// registers.
#define MANY_CHUNKS 0
#endif
// A single chunk is loaded before there are sums, when registers abound.
#define LOADS (MANY_CHUNKS ? 3 : 5)

#include "prelude.cuh"
#include "gather.cuh"
#include "tile.cuh"
#include "epilogue.cuh"
#include "async_copy.cuh"

// Channels of a thread.
#ifndef OUTPUTS
#define OUTPUTS 2
#endif
#ifndef WARPS
#define WARPS 4
#endif
// Blocks that share a multiprocessor; bounds the registers.
#ifndef RESIDENT
#define RESIDENT 1
#endif
// Whether VECTOR channels are copied at once; for float32 and float64 only.
#ifndef COPY_VECTORS
#define COPY_VECTORS 0
#endif
#ifndef CHANNELS_LAST
#define CHANNELS_LAST 1
#endif

// Numbers of a vector load from shared memory.
#define VECTOR SLOTS

#ifdef CUDA_EMULATION

union NumberBits {
    Accumulator value;
    unsigned long long bits;
};

__device__ __forceinline__ Accumulator number_of(unsigned long long bits) {
    NumberBits pun;
    pun.bits = bits;
    return pun.value;
}

#define BEGIN                \
    {                        \
        Accumulator loaded[VECTOR];
#define LOAD(offset) loaded[0] = *reinterpret_cast<const Accumulator*>(place + offset);
#define LOAD_VECTOR(offset) \
    unpack(*reinterpret_cast<const Pack*>(place + offset), loaded);
#define ADD(number, sum, bits) \
    sums[sum] = multiply_add(loaded[number], number_of(0x##bits##ull), sums[sum]);
#define END }

#elif DTYPE == FLOAT64

#define SUM(sum) "+d"(sums[sum])
#define BEGIN asm volatile("{ .reg .f64 n0, n1;\n"
#define LOAD(offset) "ld.shared.f64 n0, [" PLACE "+" #offset "];\n"
#define LOAD_VECTOR(offset) "ld.shared.v2.f64 {n0, n1}, [" PLACE "+" #offset "];\n"
#define ADD(number, sum, bits) \
    "fma.rn.f64 %" #sum ", n" #number ", 0d" #bits ", %" #sum ";\n"

#else

#define SUM(sum) "+f"(sums[sum])
#define BEGIN asm volatile("{ .reg .f32 n0, n1, n2, n3;\n"
#define LOAD(offset) "ld.shared.f32 n0, [" PLACE "+" #offset "];\n"
#define LOAD_VECTOR(offset) \
    "ld.shared.v4.f32 {n0, n1, n2, n3}, [" PLACE "+" #offset "];\n"
#define ADD(number, sum, bits) \
    "fma.rn.f32 %" #sum ", n" #number ", 0f" #bits ", %" #sum ";\n"

#endif

#ifndef CUDA_EMULATION
// The code reads shared memory that the compiler doesn't see it read.
#define END \
    "}" : SUMS : "r"(static_cast<unsigned>(__cvta_generic_to_shared(place))) : "memory");
#endif

#include "baked_code.cuh"

struct Arguments {
    const Storage* read;
    const Storage* bias;
    const int* origins;
    Storage* write;
    Geometry geometry;
    Tiling tiling;
    // The tile in shared memory; pitches in accumulators.
    int extent_h;
    int extent_w;
    int columns;
    int row_pitch;
    int column_pitch;
    int channel_pitch;
    Divisor by_extent_h;
    Divisor by_extent_w;
    Divisor by_stride_w;
    // Over a chunk's channels or, if they are copied in vectors, over its vectors.
    Divisor by_channels;
    // The first phases' origins, for when `origins` is null.
    int origin_h;
    int origin_w;
    int activation;
    int chunk;
    int chunks;
    // From one buffer to the next, in bytes; there are two if chunks are several.
    int buffer;
    // Whether QUAD channels are stored at once.
    int store_quads;
    // The first of the parts that this function has the code of: a part is OUTPUTS
    // channels of one group for one pair of row sets.
    int first_part;
    // Parts of one group.
    int group_parts;
    Steps steps;
};

// Channels that a warp stages at once, and the accumulators from a pixel to the next.
#define STAGED 32
#define STAGE_PITCH (CHANNELS_LAST ? STAGED + 4 : STAGED + 1)

// Where a block's part of the work lies.
struct alignas(16) Part {
    int set_h;
    int set_w;
    int first_input;
    int first_output;
    int outputs;
};

__device__ __forceinline__ Part find_part(const Arguments& a, int number) {
    const Geometry& geometry = a.geometry;
    const int set = number / (a.group_parts * (geometry.out_channels / geometry.group_out));
    const int part_in_set = number - set * a.group_parts *
                                         (geometry.out_channels / geometry.group_out);
    const int group = part_in_set / a.group_parts;
    const int first = (part_in_set - group * a.group_parts) * OUTPUTS;
    Part part;
    part.set_h = set / geometry.w.row_sets;
    part.set_w = set % geometry.w.row_sets;
    part.first_input = group * geometry.group_in;
    part.first_output = group * geometry.group_out + first;
    part.outputs = min(OUTPUTS, geometry.group_out - first);
    return part;
}

// Starts to bring one lattice position's vector of channels into the tile.
__device__ __forceinline__ void load_vectors(
    const Arguments& a, const Window& window, Accumulator* tile, int first_channel,
    int channels) {
    const int vectors = a.by_channels.divisor;
    const int units = a.extent_h * a.extent_w * vectors;
    // Not unrolled: copies in flight need no registers, but their addresses do.
#pragma unroll 1
    for (int unit = threadIdx.x; unit < units; unit += WARPS * WARP) {
        const int position = divide(unit, a.by_channels);
        const int channel = (unit - position * vectors) * VECTOR;
        if (channel >= channels) continue;
        const int y = divide(position, a.by_extent_w);
        const int x = position - y * a.extent_w;
        const int quotient = divide(x, a.by_stride_w);
        const int column = (x - quotient * a.by_stride_w.divisor) * a.columns + quotient;
        Accumulator* target =
            tile + y * a.row_pitch + column * a.column_pitch + channel * a.channel_pitch;
        if (contains(window, y, x)) {
            copy_async(target, window.origin + widening(y, a.steps.read_row) +
                                   widening(x, a.steps.read_column) + first_channel + channel);
        } else {
            const Accumulator zeros[VECTOR] = {};
            *reinterpret_cast<Pack*>(target) = make_pack(zeros);
        }
    }
}

// As `load_vectors`, number by number, for every layout and dtype.
__device__ __forceinline__ void load_numbers(
    const Arguments& a, const Window& window, Accumulator* tile, int first_channel,
    int channels) {
    const int area = a.extent_h * a.extent_w;
    const int units = area * (CHANNELS_LAST ? a.by_channels.divisor : channels);
    for (int first = threadIdx.x; first < units; first += LOADS * WARPS * WARP) {
        Accumulator numbers[LOADS];
        int target[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; ++u) {
            const int unit = first + u * WARPS * WARP;
            int y;
            int x;
            int channel;
            if (CHANNELS_LAST) {
                const int position = divide(unit, a.by_channels);
                channel = unit - position * a.by_channels.divisor;
                y = divide(position, a.by_extent_w);
                x = position - y * a.extent_w;
            } else {
                const int line = divide(unit, a.by_extent_w);
                x = unit - line * a.extent_w;
                channel = divide(line, a.by_extent_h);
                y = line - channel * a.extent_h;
            }
            const int quotient = divide(x, a.by_stride_w);
            const int column =
                (x - quotient * a.by_stride_w.divisor) * a.columns + quotient;
            const bool wanted = unit < units && channel < channels;
            target[u] = wanted ? y * a.row_pitch + column * a.column_pitch +
                                     channel * a.channel_pitch
                               : -1;
            numbers[u] = 0;
            if (wanted & contains(window, y, x)) {
                numbers[u] = to_accumulator(__ldg(
                    window.origin + widening(y, a.steps.read_row) +
                    widening(x, a.steps.read_column) +
                    widening(first_channel + channel, a.steps.read_channel)));
            }
        }
#pragma unroll
        for (int u = 0; u < LOADS; ++u) {
            if (target[u] >= 0) tile[target[u]] = numbers[u];
        }
    }
}

__device__ __forceinline__ void load_chunk(
    const Arguments& a, const Window& window, char* tiles, int chunk) {
    if (chunk >= a.chunks) return;
    Accumulator* tile = reinterpret_cast<Accumulator*>(tiles + (chunk & 1) * a.buffer);
    const int first_channel = chunk * a.chunk;
    const int channels = min(a.chunk, a.geometry.group_in - first_channel);
#if COPY_VECTORS
    load_vectors(a, window, tile, first_channel, channels);
#else
    load_numbers(a, window, tile, first_channel, channels);
#endif
}

// Where the thread's pixel lies in `write`; negative if there is none.
__device__ __forceinline__ long long find_offset(const Arguments& a, const Window& output) {
    const int y = divide(threadIdx.x, a.tiling.by_tile_w);
    const int x = threadIdx.x - y * a.tiling.tile_w;
    // What exists of the tile ends where the tile does, at the latest.
    if (!contains(output, y, x)) return -1;
    return output.offset + widening(y, a.steps.write_row) + widening(x, a.steps.write_column);
}

// The sums begin with the bias: at the end there would be no registers to load it into.
__device__ __forceinline__ void begin_sums(
    const Arguments& a, const Part& part, Accumulator (&sums)[OUTPUTS]) {
#pragma unroll
    for (int k = 0; k < OUTPUTS; ++k) sums[k] = 0;
    if (!a.bias) return;
    const Storage* bias = a.bias + part.first_output;
#pragma unroll
    for (int k = 0; k < OUTPUTS; ++k) {
        if (k < part.outputs) sums[k] = to_accumulator(__ldg(bias + k));
    }
}

// Applies an activation to the staged channels of the lane's own pixel. All but the
// shortest are applied here: in registers their code would stand once for every sum.
__device__ __forceinline__ void activate_staged(
    const Arguments& a, Accumulator* stage, int channels) {
#pragma unroll 1
    for (int c = 0; c < channels; ++c) stage[c] = activate(stage[c], a.activation);
}

// Stores `channels` staged channels of the warp's pixels. `offset` is where the lane's
// own pixel lies in `write`, or negative. Neighbouring lanes write neighbouring memory.
__device__ __forceinline__ void store_staged(
    const Arguments& a, const Accumulator* stage, long long offset, int first_channel,
    int channels) {
    const int lane = threadIdx.x % WARP;
    Storage* write = a.write + widening(first_channel, a.steps.write_channel);
    if (!CHANNELS_LAST) {
        if (offset < 0) return;
#pragma unroll 4
        for (int c = 0; c < channels; ++c) {
            write[offset + widening(c, a.steps.write_channel)] =
                to_storage(stage[lane * STAGE_PITCH + c]);
        }
        return;
    }
    if (!a.store_quads) {
#pragma unroll 4
        for (int pixel = 0; pixel < WARP; ++pixel) {
            const long long place = __shfl_sync(FULL_MASK, offset, pixel);
            if (lane < channels && place >= 0) {
                write[place + lane] = to_storage(stage[pixel * STAGE_PITCH + lane]);
            }
        }
        return;
    }
    const int channel = lane % (STAGED / QUAD) * QUAD;
#pragma unroll 4
    for (int first = 0; first < WARP; first += WARP / (STAGED / QUAD)) {
        const int pixel = first + lane / (STAGED / QUAD);
        const long long place = __shfl_sync(FULL_MASK, offset, pixel);
        const AccumulatorQuad sums =
            *reinterpret_cast<const AccumulatorQuad*>(stage + pixel * STAGE_PITCH + channel);
        if (channel < channels && place >= 0) {
            store_quad(write + place + channel, sums.numbers);
        }
    }
}

// Finishes the sums and stores them, STAGED channels at a time.
__device__ __forceinline__ void store(
    const Arguments& a, Accumulator* stage, long long offset, const Part& part,
    Accumulator (&sums)[OUTPUTS]) {
    if (a.activation == RELU) {
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) sums[k] = activate(sums[k], RELU);
    }
    Accumulator* own = stage + threadIdx.x % WARP * STAGE_PITCH;
#pragma unroll
    for (int first = 0; first < OUTPUTS; first += STAGED) {
        if (first) __syncwarp();
#pragma unroll
        for (int c = 0; c < STAGED; c += QUAD) {
#if CHANNELS_LAST
            AccumulatorQuad quad = {};
#pragma unroll
            for (int i = 0; i < QUAD; ++i) {
                if (first + c + i < OUTPUTS) quad.numbers[i] = sums[first + c + i];
            }
            if (first + c < OUTPUTS) *reinterpret_cast<AccumulatorQuad*>(own + c) = quad;
#else
#pragma unroll
            for (int i = c; i < c + QUAD; ++i) {
                if (first + i < OUTPUTS) own[i] = sums[first + i];
            }
#endif
        }
        const int channels = min(STAGED, part.outputs - first);
        if (a.activation > RELU) activate_staged(a, own, channels);
        __syncwarp();
        store_staged(a, stage, offset, part.first_output + first, channels);
    }
}

// What a block's threads share. It lies in shared memory, from where it is read again
// when it is needed: the sums take nearly all registers.
struct Shared {
    Window input;
    Window output;
    Part part;
};

// The plan reserves so much in front of the tiles.
static_assert(sizeof(Shared) == 96, "SHARED_BYTES in baked.py must be changed, too");

__device__ __forceinline__ void find_work(const Arguments& a, Shared& shared) {
    const int local_part = blockIdx.x / a.tiling.subtiles;
    const Part part = find_part(a, a.first_part + local_part);
    shared.part = part;
    shared.input = empty_window();
    shared.output = empty_window();
    Subtile subtile;
    if (find_subtile(blockIdx.x - local_part * a.tiling.subtiles, part.set_h, part.set_w,
                     a.geometry, a.tiling, subtile)) {
        // Usually there is but one phase, whose origins need no memory.
        int origin_h = a.origin_h;
        int origin_w = a.origin_w;
        if (a.origins) {
            origin_h = __ldg(a.origins + subtile.phase_h);
            origin_w = __ldg(a.origins + a.geometry.h.visited + subtile.phase_w);
        }
        shared.input = input_window(a.read, subtile, part.first_input, a.geometry,
                                    a.extent_h, a.extent_w, origin_h, origin_w);
        shared.output = output_window(a.write, subtile, a.geometry, a.tiling);
    }
}

// Where the thread reads the tile for the first tap, in bytes. A thread behind the
// tile's end computes pixel 0 again; it isn't stored.
__device__ __forceinline__ int find_place(const Arguments& a) {
    const int y = divide(threadIdx.x, a.tiling.by_tile_w);
    const int x = threadIdx.x - y * a.tiling.tile_w;
    if (y >= a.tiling.tile_h) return 0;
    return (y * a.geometry.h.stride * a.row_pitch + x * a.column_pitch) *
           static_cast<int>(sizeof(Accumulator));
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP, RESIDENT)
    conv2d_baked(const Arguments a) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    char* tiles = memory + sizeof(Shared);
    if (threadIdx.x == 0) find_work(a, shared);
    __syncthreads();

    // Blocks that run the same code are neighbours.
    const int first_piece = blockIdx.x / a.tiling.subtiles * a.chunks;
    const char* place = tiles + find_place(a);
    load_chunk(a, shared.input, tiles, 0);
    commit_copies();
    Accumulator sums[OUTPUTS];
    begin_sums(a, shared.part, sums);
    for (int chunk = 0; chunk < (MANY_CHUNKS ? a.chunks : 1); ++chunk) {
        if (MANY_CHUNKS) {
            load_chunk(a, shared.input, tiles, chunk + 1);
            commit_copies();
        }
        wait_for_copies<MANY_CHUNKS>();
        __syncthreads();
        accumulate(first_piece + chunk, place + (chunk & 1) * a.buffer, sums);
        // The next chunk but one comes where this one was, the outputs where tiles were.
        __syncthreads();
    }
    const long long offset = find_offset(a, shared.output);
    Accumulator* stage = reinterpret_cast<Accumulator*>(tiles);
    store(a, stage + threadIdx.x / WARP * WARP * STAGE_PITCH, offset, shared.part, sums);
}
