// Forward pass and input gradient for one kernel, whose pattern and values are code.
//
// Every thread computes OUTPUTS channels of PIXELS pixels, one above the other. For each
// input that it reads, there is one instruction for each nonzero weight of that input and
// pixel, with the weight as its immediate operand: nothing is decoded and no zero is
// visited. The instructions are generated (see baked_code.cuh), and so are the numbers of
// LAYOUT; this text is what surrounds them: it brings tiles of the input into shared
// memory, a chunk of channels ahead of the computation, and stores.
//
// A block stays and takes one tile after the other, so that the next tile is on its way
// and the last outputs are on theirs while it computes. One warp more than compute finds
// out where the next tile lies.
//
// The idea of weights as operands of straight-line code is SparseRT's (Z. Wang,
// https://arxiv.org/abs/2008.11849).

#ifndef MANY_CHUNKS
// Whether the channels come in several chunks; compiled in, because the loop costs
// registers.
#define MANY_CHUNKS 0
#endif

#include "prelude.cuh"
#include "gather.cuh"
#include "tile.cuh"
#include "epilogue.cuh"
#include "async_copy.cuh"

// Channels and pixels of a thread.
#ifndef OUTPUTS
#define OUTPUTS 2
#endif
#ifndef PIXELS
#define PIXELS 1
#endif
// Warps that compute.
#ifndef WARPS
#define WARPS 4
#endif
// Blocks that share a multiprocessor; bounds the registers.
#ifndef RESIDENT
#define RESIDENT 1
#endif
// Whether VECTOR channels are loaded at once.
#ifndef LOAD_VECTORS
#define LOAD_VECTORS 0
#endif
#ifndef CHANNELS_LAST
#define CHANNELS_LAST 1
#endif
// Whether there is room for two tiles, so that the next one is loaded while the last one
// serves.
#ifndef BUFFERED
#define BUFFERED 1
#endif

// Numbers of a vector load from shared memory.
#define VECTOR SLOTS
// Whether numbers are stored as they are accumulated, so that they can be copied.
#define COPIES (DTYPE == FLOAT32 || DTYPE == FLOAT64)
// Numbers that are converted pass through registers. VECTOR channels may then be read at
// once, even if they lie apart in the tile.
#ifndef SCATTERS
#define SCATTERS 0
#endif
// So many loads of a thread are on their way together, of numbers that are converted:
// they and their addresses take registers, which copies do not. The plan sees to it that
// there is room, except where a single tile is loaded again beside all sums.
#ifndef IN_FLIGHT
#define IN_FLIGHT 2
#endif
#define IN_FLIGHT_BESIDE_SUMS 2
// Numbers that are loaded at once.
#define UNIT (LOAD_VECTORS || SCATTERS ? VECTOR : 1)

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
    sums.of[sum] = \
        multiply_add(loaded[number], number_of(0x##bits##ull), sums.of[sum]);
#define END }

#elif DTYPE == FLOAT64

#define SUM(sum) "+d"(sums.of[sum])
#define BEGIN asm volatile("{ .reg .f64 n0, n1;\n"
#define LOAD(offset) "ld.shared.f64 n0, [" PLACE "+" #offset "];\n"
#define LOAD_VECTOR(offset) "ld.shared.v2.f64 {n0, n1}, [" PLACE "+" #offset "];\n"
#define ADD(number, sum, bits) \
    "fma.rn.f64 %" #sum ", n" #number ", 0d" #bits ", %" #sum ";\n"

#else

#define SUM(sum) "+f"(sums.of[sum])
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

// All sums of a pixel, then those of the next.
struct Sums {
    Accumulator of[PIXELS * OUTPUTS];
};

// What the code is generated for. It is compiled in, because a launch is short: the first
// tile is on its way when half as many instructions have been fetched.
struct Layout {
    Geometry geometry;
    Tiling tiling;
    // The tile in shared memory; pitches in accumulators.
    int extent_h;
    int extent_w;
    int columns;
    int row_pitch;
    int column_pitch;
    int channel_pitch;
    // How the threads share the loading: so many load the same row, and so many of them
    // channels of the same column, UNIT each.
    Divisor by_row_threads;
    Divisor by_column_threads;
    int rows_at_once;
    int columns_at_once;
    // So often, for all rows and columns, and all channels of a chunk.
    int row_turns;
    int column_turns;
    int channel_turns;
    // Whether there is but one phase, and its origins then.
    int has_one_phase;
    int origin_h;
    int origin_w;
    int chunk;
    int chunks;
    // From one buffer to the next, in bytes.
    int buffer;
    // Where outputs are staged, behind the buffers.
    int stage;
    // Whether QUAD channels are stored at once.
    int store_quads;
    // The parts that this function has the code of: a part is OUTPUTS channels of one
    // group for one pair of row sets.
    int first_part;
    int parts;
    // Over the parts of a pair of row sets, and those of a group.
    Divisor by_set_parts;
    Divisor by_group_parts;
    Divisor by_sets_w;
    Steps steps;
};

#include "baked_code.cuh"

__device__ constexpr Layout LAYOUT = {LAYOUT_NUMBERS};

// What differs from call to call.
struct Arguments {
    const Storage* read;
    const Storage* bias;
    // Null where there is one phase.
    const int* origins;
    Storage* write;
    int activation;
    // Tiles of all parts of this function, and the tiles of a part.
    int items;
    Divisor by_tiles;
};

// Channels that a warp stages at once, and the accumulators from a pixel to the next. An
// odd number of 16 bytes spreads neighbouring lanes over all banks.
#define STAGED 32
#define PADDING (CHANNELS_LAST ? 16 / static_cast<int>(sizeof(Accumulator)) : 1)
#define STAGE_PITCH (STAGED + PADDING)

// Which outputs an item computes.
struct Part {
    int set_h;
    int set_w;
    int first_input;
    int first_output;
    int outputs;
};

// What a block's threads share about one item: a tile of one part. It lies in shared
// memory, from where it is read again when it is needed: the sums take nearly all
// registers.
struct Item {
    Window input;
    Window output;
    // The part, of those of this function.
    int part;
};

// Of the item that some threads still store, the one that is computed, and the next one,
// which is found and loaded meanwhile.
#define ITEMS 3

// The plan reserves so much in front of the tiles.
static_assert(sizeof(Item) == 80, "ITEM_BYTES in baked.py must be changed, too");

// With a single part, all of it is known to the compiler.
__device__ __forceinline__ Part find_part(int number) {
    const Geometry& geometry = LAYOUT.geometry;
    int set_h = LAYOUT.first_part + (LAYOUT.parts > 1 ? number : 0);
    int group = divide_on(set_h, LAYOUT.by_set_parts);
    const int set_w = divide_on(set_h, LAYOUT.by_sets_w);
    const int first = divide_on(group, LAYOUT.by_group_parts) * OUTPUTS;
    Part part;
    part.set_h = set_h;
    part.set_w = set_w;
    part.first_input = group * geometry.group_in;
    part.first_output = group * geometry.group_out + first;
    part.outputs = geometry.group_out % OUTPUTS == 0
                       ? OUTPUTS
                       : min(OUTPUTS, geometry.group_out - first);
    return part;
}

// Items that run the same code are neighbours.
__device__ __forceinline__ void find_item(const Arguments& a, unsigned number, Item& item) {
    const Geometry& geometry = LAYOUT.geometry;
    int tile = static_cast<int>(number);
    item.part = 0;
    if (LAYOUT.parts > 1) {
        item.part = tile;
        tile = divide_on(item.part, a.by_tiles);
    }
    const Part part = find_part(item.part);
    item.input = empty_window();
    item.output = empty_window();
    Subtile subtile;
    if (find_subtile(tile, part.set_h, part.set_w, geometry, LAYOUT.tiling, subtile)) {
        int origin_h = LAYOUT.origin_h;
        int origin_w = LAYOUT.origin_w;
        if (!LAYOUT.has_one_phase) {
            origin_h = __ldg(a.origins + subtile.phase_h);
            origin_w = __ldg(a.origins + geometry.h.visited + subtile.phase_w);
        }
        item.input = input_window(a.read, subtile, part.first_input, geometry,
                                  LAYOUT.extent_h, LAYOUT.extent_w, origin_h, origin_w);
        item.output = output_window(a.write, subtile, geometry, LAYOUT.tiling);
    }
}

// `load_rows` brings UNIT numbers of each of some rows of the tile, `rows` apart, from one
// column of the input; zeros where there are none.
#if COPIES

// Copies need no registers, so that all may be on their way together, and each of them
// few instructions: where it goes is known to the compiler.
template <int LOADS_AHEAD>
__device__ __forceinline__ void load_rows(
    const Window& window, const Storage* origin, int source, int source_step,
    bool column_exists, Accumulator* target, int target_step, int row, int rows,
    int extent_h) {
    const int turns = LAYOUT.row_turns;
#pragma unroll 16
    for (int turn = 0; turn < turns; ++turn) {
        const int y = row + turn * rows;
        const bool exists = column_exists & (static_cast<unsigned>(y - window.y_begin) <
                                             static_cast<unsigned>(window.y_count));
        // Only the last turn may have no row for some threads.
        if ((turn + 1) * rows <= extent_h || y < extent_h) {
            copy_async<sizeof(Accumulator) * UNIT>(
                target + turn * target_step, origin + source + turn * source_step, exists);
        }
    }
}

#else

// UNIT numbers as they are stored.
#if UNIT > 1
typedef uint2 Stored;
#else
typedef Storage Stored;
#endif

__device__ __forceinline__ void put(Accumulator* target, const Stored& stored) {
#if UNIT > 1
    // Two numbers of 16 bits in a word.
    const Accumulator numbers[VECTOR] = {
        to_accumulator(static_cast<Storage>(stored.x & 0xffff)),
        to_accumulator(static_cast<Storage>(stored.x >> 16)),
        to_accumulator(static_cast<Storage>(stored.y & 0xffff)),
        to_accumulator(static_cast<Storage>(stored.y >> 16))};
#if LOAD_VECTORS
    *reinterpret_cast<Pack*>(target) = make_pack(numbers);
#else
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) target[i] = numbers[i];
#endif
#else
    *target = to_accumulator(stored);
#endif
}

template <int LOADS_AHEAD>
__device__ __forceinline__ void load_rows(
    const Window& window, const Storage* origin, int source, int source_step,
    bool column_exists, Accumulator* target, int target_step, int row, int rows,
    int extent_h) {
    while (row < extent_h) {
        Stored stored[LOADS_AHEAD];
        int y = row;
#pragma unroll
        for (int i = 0; i < LOADS_AHEAD; ++i) {
            const bool exists = column_exists & (static_cast<unsigned>(y - window.y_begin) <
                                                 static_cast<unsigned>(window.y_count));
            stored[i] = Stored();
            if (exists) stored[i] = __ldg(reinterpret_cast<const Stored*>(origin + source));
            source += source_step;
            y += rows;
        }
#pragma unroll
        for (int i = 0; i < LOADS_AHEAD; ++i) {
            if (row < extent_h) put(target, stored[i]);
            target += target_step;
            row += rows;
        }
    }
}

#endif

// Starts to bring a chunk of channels of what an item reads into a tile.
template <int LOADS_AHEAD>
__device__ __forceinline__ void load_tile(
    const Window& shared_window, char* buffer, int first_channel) {
    // Read once: nobody but us knows that copies don't change it.
    const Window window = shared_window;
    Accumulator* tile = reinterpret_cast<Accumulator*>(buffer);
    const int row = divide(threadIdx.x, LAYOUT.by_row_threads);
    const int in_row = threadIdx.x - row * LAYOUT.by_row_threads.divisor;
    const int column = divide(in_row, LAYOUT.by_column_threads);
    const int in_column = in_row - column * LAYOUT.by_column_threads.divisor;
    // The threads of the last, incomplete row have nothing to load.
    const int channels = row < LAYOUT.rows_at_once
                             ? min(LAYOUT.chunk, LAYOUT.geometry.group_in - first_channel)
                             : 0;
    const int stride = LAYOUT.geometry.w.stride;
    const Storage* origin =
        window.origin + widening(first_channel, LAYOUT.steps.read_channel);
    const int source_step = LAYOUT.rows_at_once * LAYOUT.steps.read_row;
    const int target_step = LAYOUT.rows_at_once * LAYOUT.row_pitch;
#pragma unroll 1
    for (int channel_turn = 0; channel_turn < LAYOUT.channel_turns; ++channel_turn) {
        const int channel =
            (channel_turn * LAYOUT.by_column_threads.divisor + in_column) * UNIT;
        if (channel >= channels) break;
#pragma unroll 1
        for (int column_turn = 0; column_turn < LAYOUT.column_turns; ++column_turn) {
            const int quotient = column_turn * LAYOUT.columns_at_once + column;
            if (quotient >= LAYOUT.columns) break;
#pragma unroll 1
            for (int remainder = 0; remainder < stride; ++remainder) {
                const int x = quotient * stride + remainder;
                const bool column_exists = static_cast<unsigned>(x - window.x_begin) <
                                           static_cast<unsigned>(window.x_count);
                const int source = channel * LAYOUT.steps.read_channel +
                                   x * LAYOUT.steps.read_column +
                                   row * LAYOUT.steps.read_row;
                Accumulator* target =
                    tile + channel * LAYOUT.channel_pitch + row * LAYOUT.row_pitch +
                    (remainder * LAYOUT.columns + quotient) * LAYOUT.column_pitch;
                load_rows<LOADS_AHEAD>(window, origin, source, source_step, column_exists,
                                       target, target_step, row, LAYOUT.rows_at_once,
                                       LAYOUT.extent_h);
            }
        }
    }
    commit_copies();
}

// Where the thread's pixel lies, from the item's first on; negative if there is none.
__device__ __forceinline__ int find_offset(const Window& output, int pixel) {
    const int strip = divide(threadIdx.x, LAYOUT.tiling.by_tile_w);
    const int x = threadIdx.x - strip * LAYOUT.tiling.tile_w;
    const int y = strip * PIXELS + pixel;
    // What exists of the tile ends where the tile does, at the latest.
    if (!contains(output, y, x)) return -1;
    return y * LAYOUT.steps.write_row + x * LAYOUT.steps.write_column;
}

// The sums begin with the bias: at the end there would be no registers to load it into.
__device__ __forceinline__ void begin_sums(
    const Arguments& a, const Part& part, Sums& sums) {
    sums = {};
    if (!a.bias) return;
    const Storage* bias = a.bias + part.first_output;
#pragma unroll
    for (int k = 0; k < OUTPUTS; ++k) {
        if (k >= part.outputs) break;
        const Accumulator number = to_accumulator(__ldg(bias + k));
#pragma unroll
        for (int pixel = 0; pixel < PIXELS; ++pixel) sums.of[pixel * OUTPUTS + k] = number;
    }
}

// Applies an activation to the staged channels of the lane's own pixel. All but the
// shortest are applied here: in registers their code would stand once for every sum.
__device__ __forceinline__ void activate_staged(
    const Arguments& a, Accumulator* stage, int channels) {
#pragma unroll 1
    for (int c = 0; c < channels; ++c) stage[c] = activate(stage[c], a.activation);
}

// Stores `channels` staged channels of the warp's pixels, of which the first one's place
// is `write`. `offset` is where the lane's own pixel lies from there on, or negative.
// Neighbouring lanes write neighbouring memory.
__device__ __forceinline__ void store_staged(
    const Accumulator* stage, Storage* write, int offset, int channels) {
    const int lane = threadIdx.x % WARP;
    // Few channels of neighbouring pixels lie close enough.
    if (!CHANNELS_LAST || OUTPUTS < QUAD) {
        if (offset < 0) return;
#pragma unroll 4
        for (int c = 0; c < channels; ++c) {
            write[offset + c * LAYOUT.steps.write_channel] =
                to_storage(stage[lane * STAGE_PITCH + c]);
        }
        return;
    }
    if (!LAYOUT.store_quads) {
#pragma unroll 4
        for (int pixel = 0; pixel < WARP; ++pixel) {
            const int place = __shfl_sync(FULL_MASK, offset, pixel);
            if (lane < channels && place >= 0) {
                write[place + lane] = to_storage(stage[pixel * STAGE_PITCH + lane]);
            }
        }
        return;
    }
    const int channel = lane % (STAGED / QUAD) * QUAD;
    write += channel;
#pragma unroll
    for (int first = 0; first < WARP; first += WARP / (STAGED / QUAD)) {
        const int pixel = first + lane / (STAGED / QUAD);
        const int place = __shfl_sync(FULL_MASK, offset, pixel);
        const AccumulatorQuad sums =
            *reinterpret_cast<const AccumulatorQuad*>(stage + pixel * STAGE_PITCH + channel);
        if (channel < channels && place >= 0) store_quad(write + place, sums.numbers);
    }
}

// Stages sums in the order of their channels, QUAD at a time.
__device__ __forceinline__ void stage_quads(
    Accumulator* own, const Accumulator* sums, int first) {
#pragma unroll
    for (int c = 0; c < STAGED; c += QUAD) {
        AccumulatorQuad quad = {};
#pragma unroll
        for (int i = 0; i < QUAD; ++i) {
            if (first + c + i < OUTPUTS) quad.numbers[i] = sums[first + c + i];
        }
        if (first + c < OUTPUTS) *reinterpret_cast<AccumulatorQuad*>(own + c) = quad;
    }
}

// Stores the sums of one of the thread's pixels, STAGED channels at a time.
__device__ __forceinline__ void store_pixel(
    const Arguments& a, Accumulator* stage, const Item& item, int pixel,
    const Accumulator* sums) {
    const Part part = find_part(item.part);
    const int offset = find_offset(item.output, pixel);
    Storage* write = a.write + item.output.offset +
                     widening(part.first_output, LAYOUT.steps.write_channel);
    Accumulator* own = stage + threadIdx.x % WARP * STAGE_PITCH;
#pragma unroll
    for (int first = 0; first < OUTPUTS; first += STAGED) {
        if (first || pixel) __syncwarp();
#if CHANNELS_LAST
        stage_quads(own, sums, first);
#else
#pragma unroll
        for (int k = first; k < first + STAGED; ++k) {
            if (k < OUTPUTS) own[k - first] = sums[k];
        }
#endif
        const int channels = min(STAGED, part.outputs - first);
        if (a.activation > RELU) activate_staged(a, own, channels);
        __syncwarp();
        store_staged(stage, write + widening(first, LAYOUT.steps.write_channel), offset,
                     channels);
    }
}

// Finishes the sums and stores them.
__device__ __forceinline__ void store(
    const Arguments& a, Accumulator* stage, const Item& item, Sums& sums) {
    if (a.activation == RELU) {
#pragma unroll
        for (int k = 0; k < PIXELS * OUTPUTS; ++k) {
            sums.of[k] = activate(sums.of[k], RELU);
        }
    }
#pragma unroll
    for (int pixel = 0; pixel < PIXELS; ++pixel) {
        store_pixel(a, stage, item, pixel, sums.of + pixel * OUTPUTS);
    }
}

// Where the thread reads the tile for the first tap of its first pixel, in bytes. A thread
// behind the tile's end computes pixel 0 again; it isn't stored.
__device__ __forceinline__ int find_place() {
    const int strip = divide(threadIdx.x, LAYOUT.tiling.by_tile_w);
    const int x = threadIdx.x - strip * LAYOUT.tiling.tile_w;
    const int y = strip * PIXELS;
    if (y >= LAYOUT.tiling.tile_h) return 0;
    return (y * LAYOUT.geometry.h.stride * LAYOUT.row_pitch + x * LAYOUT.column_pitch) *
           static_cast<int>(sizeof(Accumulator));
}

// Where those who compute and the scout meet, each at a place of their own: a barrier that
// counts the block's threads, wherever they come from.
__device__ __forceinline__ void meet() {
#ifdef CUDA_EMULATION
    __syncthreads();
#else
    asm volatile("barrier.sync 1, %0;" ::"n"((WARPS + 1) * WARP) : "memory");
#endif
}

#define PARTIAL_SUMS 16

// Adds a chunk's products to the sums. `piece` counts the chunks of all parts. Where there are registers, they have sums of their
// own: rounding errors then grow with the number of chunks, plus that of a chunk's products.
__device__ __forceinline__ void add_chunk(int piece, const char* place, Sums& sums) {
#if MANY_CHUNKS && PIXELS * OUTPUTS <= PARTIAL_SUMS
    Sums partial = {};
    accumulate(piece, place, partial);
#pragma unroll
    for (int k = 0; k < PIXELS * OUTPUTS; ++k) sums.of[k] += partial.of[k];
#else
    accumulate(piece, place, sums);
#endif
}

// The items that a block computes: this one, and every gridDim.x-th from it on.
#define FOR_ITEMS(number) \
    for (unsigned number = blockIdx.x; number < a.items; number += gridDim.x)

// What the last warp does: it finds the next item while the others compute.
__device__ __forceinline__ void scout(const Arguments& a, Item* items) {
    int turn = 0;
    FOR_ITEMS(number) {
        // In the place of an item that all have left: they have met since.
        turn = turn == ITEMS - 1 ? 0 : turn + 1;
        if (threadIdx.x % WARP == 0 && number + gridDim.x < a.items) {
            find_item(a, number + gridDim.x, items[turn]);
        }
        __syncwarp();
        for (int chunk = 0; chunk < (MANY_CHUNKS ? LAYOUT.chunks : 1); ++chunk) {
            meet();
            if (!BUFFERED) meet();
        }
    }
}

extern "C" __global__ void __launch_bounds__((WARPS + 1) * WARP, RESIDENT)
    conv2d_baked(const Arguments a) {
    SHARED_MEMORY(memory);
    Item* items = reinterpret_cast<Item*>(memory);
    char* tiles = memory + ITEMS * sizeof(Item);
    if (threadIdx.x == WARPS * WARP) find_item(a, blockIdx.x, items[0]);
    const char* place = tiles + find_place();
    __syncthreads();
    if (threadIdx.x >= WARPS * WARP) {
        scout(a, items);
        return;
    }

    int buffer = 0;
    int turn = 0;
    load_tile<IN_FLIGHT>(items[0].input, tiles, 0);
    FOR_ITEMS(number) {
        const Item& item = items[turn];
        turn = turn == ITEMS - 1 ? 0 : turn + 1;
        Sums sums;
        for (int chunk = 0; chunk < (MANY_CHUNKS ? LAYOUT.chunks : 1); ++chunk) {
            wait_for_copies<0>();
            meet();
            const bool goes_on = MANY_CHUNKS && chunk + 1 < LAYOUT.chunks;
            const bool loads = goes_on || number + gridDim.x < a.items;
            const Window& next = goes_on ? item.input : items[turn].input;
            const int next_channel = goes_on ? (chunk + 1) * LAYOUT.chunk : 0;
            const int next_buffer = BUFFERED ? LAYOUT.buffer - buffer : 0;
            // Nobody reads the other buffer any more.
            if (loads && BUFFERED) {
                load_tile<IN_FLIGHT>(next, tiles + next_buffer, next_channel);
            }
            if (chunk == 0) begin_sums(a, find_part(item.part), sums);
            add_chunk(item.part * LAYOUT.chunks + chunk, place + buffer, sums);
            if (!BUFFERED) {
                meet();
                if (loads) {
                    load_tile<IN_FLIGHT_BESIDE_SUMS>(next, tiles, next_channel);
                }
            }
            buffer = next_buffer;
        }
        Accumulator* stage = reinterpret_cast<Accumulator*>(tiles + LAYOUT.stage);
        store(a, stage + threadIdx.x / WARP * WARP * STAGE_PITCH, item, sums);
    }
}
