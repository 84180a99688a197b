// Forward pass and input gradient for one kernel, whose pattern and values are code.
//
// Every thread computes OUTPUTS channels of PIXELS pixels, one above the other, and the
// threads of a team a tile of them; other teams of a block compute other channels of the
// same tile. For each input that a thread reads, there is one instruction for each nonzero
// weight of that input and pixel, with the weight as its immediate operand: nothing is
// decoded and no zero is visited. The instructions are generated (see baked_code.cuh), and
// so are the numbers of LAYOUT; this text is what surrounds them: it brings tiles of the
// input into shared memory, a chunk of channels ahead of the computation, and stores.
//
// Where an image is small and there are many channels, the blocks of a cluster split the
// channels among them: each computes with the code of its own share, all at the same time.
// Then they exchange their sums, so that each block finishes some of the outputs. A cluster
// computes a single item.
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
// Teams of warps: each computes another part from the same tile of the input.
#ifndef TEAMS
#define TEAMS 1
#endif
#define TEAM_THREADS (WARPS / TEAMS * WARP)
// Blocks that share a multiprocessor; bounds the registers.
#ifndef RESIDENT
#define RESIDENT 1
#endif
// Blocks of a cluster, which share the input channels.
#ifndef SPLITS
#define SPLITS 1
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
// Channels that a thread loads at once. More of those that are converted may be read than
// lie side by side in the tile.
#ifndef UNIT
#define UNIT (LOAD_VECTORS ? VECTOR : 1)
#endif
// Numbers that are converted are copied, too, where UNIT of them are long enough for a
// copy. They land beside the tile, and whoever had them copied converts them.
#define LANDS (!COPIES && UNIT > 1)
// So many loads of a thread are converted together.
#define CONVERTED (32 / UNIT)
// The others pass through registers. So many loads of a thread are on their way together;
// the plan sees to it that there is room, except where a single tile is loaded again
// beside all sums.
#ifndef IN_FLIGHT
#define IN_FLIGHT 2
#endif
#define IN_FLIGHT_BESIDE_SUMS 2

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

#if SPLITS > 1
#include "cluster_sums.cuh"
#endif

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
    // Those of a block, and all.
    int own_chunks;
    int chunks;
    // From one buffer to the next, in bytes.
    int buffer;
    // Where outputs are staged or sums exchanged, behind the buffers, and where numbers
    // land.
    int stage;
    int landing;
    // Whether QUAD channels are stored at once.
    int store_quads;
    // The parts that this function has the code of: a part is OUTPUTS channels of one
    // group for one pair of row sets.
    int first_part;
    int parts;
    // Over the multiprocessors, and over those that compute the same part; 0 where all
    // compute one part after the other.
    Divisor by_multiprocessors;
    Divisor by_sharers;
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
    // Items of this function, some of which may have no tile, and the tiles of a part.
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

// What a block's threads share about one item: a tile of one part for each team. It lies in
// shared memory, from where it is read again when it is needed: the sums take nearly all
// registers.
struct Item {
    Window input;
    Window output;
    // The first team's part, of those of this function; the next ones are the others'.
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

// The first item of the block, or the only one of its cluster.
__device__ __forceinline__ unsigned find_first() { return blockIdx.x / SPLITS; }

// A multiprocessor keeps little code. Where the blocks on it compute the same part, it
// fetches no other: the first blocks go to the multiprocessors in turn, and so do the next.
// Otherwise items that run the same code are neighbours.
#define SHARES_CODE (LAYOUT.by_sharers.divisor > 0)

// The first number that is no item of this block.
__device__ __forceinline__ unsigned find_end(const Arguments& a) {
    if (!SHARES_CODE) return a.items;
    int turn = find_first();
    int part = divide_on(turn, LAYOUT.by_multiprocessors);
    const int first = divide_on(part, LAYOUT.by_sharers);
    if (part * TEAMS >= LAYOUT.parts || first >= a.by_tiles.divisor) return 0;
    const int turns = divide(a.by_tiles.divisor - 1 - first, LAYOUT.by_sharers) + 1;
    return turns * LAYOUT.by_multiprocessors.divisor;
}

__device__ __forceinline__ void find_item(const Arguments& a, unsigned number, Item& item) {
    const Geometry& geometry = LAYOUT.geometry;
    int tile = static_cast<int>(number);
    item.part = 0;
    if (SHARES_CODE) {
        item.part = divide_on(tile, LAYOUT.by_multiprocessors);
        const int first = divide_on(item.part, LAYOUT.by_sharers);
        tile = tile * LAYOUT.by_sharers.divisor + first;
    } else if (LAYOUT.parts > TEAMS) {
        item.part = tile;
        tile = divide_on(item.part, a.by_tiles);
    }
    item.part *= TEAMS;
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

// A column of the tile as a thread loads it: UNIT numbers of every `rows_at_once`-th row,
// from `row` on, zeros where there is no input.
struct Column {
    const Storage* source;
    Accumulator* target;
    int row;
    bool exists;
    // Loads of the thread before these.
    int turns_before;
};

__device__ __forceinline__ bool input_exists(
    const Window& window, const Column& column, int turn) {
    const int y = column.row + turn * LAYOUT.rows_at_once;
    return column.exists & (static_cast<unsigned>(y - window.y_begin) <
                            static_cast<unsigned>(window.y_count));
}

// Only the last turn may have no row for some threads.
__device__ __forceinline__ bool is_in_tile(const Column& column, int turn) {
    return (turn + 1) * LAYOUT.rows_at_once <= LAYOUT.extent_h ||
           column.row + turn * LAYOUT.rows_at_once < LAYOUT.extent_h;
}

__device__ __forceinline__ const Storage* source_of(const Column& column, int turn) {
    return column.source + turn * LAYOUT.rows_at_once * LAYOUT.steps.read_row;
}

__device__ __forceinline__ Accumulator* target_of(const Column& column, int turn) {
    return column.target + turn * LAYOUT.rows_at_once * LAYOUT.row_pitch;
}

#if !COPIES

// UNIT numbers as they are stored.
#if LANDS
struct alignas(2 * UNIT) Stored {
    // Two numbers of 16 bits each.
    unsigned words[UNIT / 2];
};
#else
typedef Storage Stored;
#endif

__device__ __forceinline__ void put(Accumulator* target, const Stored& stored) {
#if LANDS
#pragma unroll
    for (int first = 0; first < UNIT; first += VECTOR) {
        Accumulator numbers[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const unsigned word = stored.words[(first + i) / 2];
            numbers[i] = to_accumulator(static_cast<Storage>(i % 2 ? word >> 16 : word));
        }
#if LOAD_VECTORS
        *reinterpret_cast<Pack*>(target + first) = make_pack(numbers);
#else
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) target[first + i] = numbers[i];
#endif
    }
#else
    *target = to_accumulator(stored);
#endif
}

#endif

#if COPIES || LANDS

// Copies need no registers, so that all may be on their way together, and each of them
// few instructions: where it goes is known to the compiler.
struct Load {
    const Window& window;
#if LANDS
    Stored* landing;
#endif

    __device__ __forceinline__ void operator()(const Column& column) const {
        const int turns = LAYOUT.row_turns;
#pragma unroll 16
        for (int turn = 0; turn < turns; ++turn) {
            if (!is_in_tile(column, turn)) continue;
#if LANDS
            void* target = landing + (column.turns_before + turn) * WARPS * WARP;
#else
            void* target = target_of(column, turn);
#endif
            copy_async<sizeof(Storage) * UNIT>(
                target, source_of(column, turn), input_exists(window, column, turn));
        }
    }
};

#else

template <int LOADS_AHEAD>
struct Load {
    const Window& window;

    __device__ __forceinline__ void operator()(const Column& column) const {
#pragma unroll 1
        for (int first = 0; first < LAYOUT.row_turns; first += LOADS_AHEAD) {
            Stored stored[LOADS_AHEAD];
#pragma unroll
            for (int i = 0; i < LOADS_AHEAD; ++i) {
                stored[i] = Stored();
                if (input_exists(window, column, first + i)) {
                    stored[i] = __ldg(source_of(column, first + i));
                }
            }
#pragma unroll
            for (int i = 0; i < LOADS_AHEAD; ++i) {
                if (is_in_tile(column, first + i)) {
                    put(target_of(column, first + i), stored[i]);
                }
            }
        }
    }
};

#endif

#if LANDS

// Where a thread's numbers land, one turn behind the other.
__device__ __forceinline__ Stored* find_landing(char* tiles) {
    return reinterpret_cast<Stored*>(tiles + LAYOUT.landing) + threadIdx.x;
}

// Converts what has landed, some loads at a time: the compiler doesn't know that where
// they land is not where they go.
struct Convert {
    const Stored* landing;

    __device__ __forceinline__ void operator()(const Column& column) const {
        const int turns = LAYOUT.row_turns;
#pragma unroll
        for (int first = 0; first < turns; first += CONVERTED) {
            Stored stored[CONVERTED];
#pragma unroll
            for (int i = 0; i < CONVERTED && first + i < turns; ++i) {
                stored[i] = landing[(column.turns_before + first + i) * WARPS * WARP];
            }
#pragma unroll
            for (int i = 0; i < CONVERTED && first + i < turns; ++i) {
                if (is_in_tile(column, first + i)) {
                    put(target_of(column, first + i), stored[i]);
                }
            }
        }
    }
};

#endif

// Visits each column that this thread loads of a chunk of channels of what an item reads.
template <class Visitor>
__device__ __forceinline__ void visit_columns(
    const Window& window, char* buffer, int first_channel, const Visitor& visitor) {
    Accumulator* tile = reinterpret_cast<Accumulator*>(buffer);
    Column column;
    column.row = divide(threadIdx.x, LAYOUT.by_row_threads);
    const int in_row = threadIdx.x - column.row * LAYOUT.by_row_threads.divisor;
    const int place = divide(in_row, LAYOUT.by_column_threads);
    const int in_column = in_row - place * LAYOUT.by_column_threads.divisor;
    // The threads of the last, incomplete row have nothing to load.
    const int channels = column.row < LAYOUT.rows_at_once
                             ? min(LAYOUT.chunk, LAYOUT.geometry.group_in - first_channel)
                             : 0;
    const int stride = LAYOUT.geometry.w.stride;
    const Storage* origin =
        window.origin + widening(first_channel, LAYOUT.steps.read_channel);
#pragma unroll 1
    for (int channel_turn = 0; channel_turn < LAYOUT.channel_turns; ++channel_turn) {
        const int channel =
            (channel_turn * LAYOUT.by_column_threads.divisor + in_column) * UNIT;
        if (channel >= channels) break;
#pragma unroll 1
        for (int column_turn = 0; column_turn < LAYOUT.column_turns; ++column_turn) {
            const int quotient = column_turn * LAYOUT.columns_at_once + place;
            if (quotient >= LAYOUT.columns) break;
#pragma unroll 1
            for (int remainder = 0; remainder < stride; ++remainder) {
                const int x = quotient * stride + remainder;
                column.exists = static_cast<unsigned>(x - window.x_begin) <
                                static_cast<unsigned>(window.x_count);
                column.source = origin + (channel * LAYOUT.steps.read_channel +
                                          x * LAYOUT.steps.read_column +
                                          column.row * LAYOUT.steps.read_row);
                column.target =
                    tile + channel * LAYOUT.channel_pitch + column.row * LAYOUT.row_pitch +
                    (remainder * LAYOUT.columns + quotient) * LAYOUT.column_pitch;
                column.turns_before =
                    ((channel_turn * LAYOUT.column_turns + column_turn) * stride +
                     remainder) * LAYOUT.row_turns;
                visitor(column);
            }
        }
    }
}

// Starts to bring a chunk of channels of what an item reads into a tile, or beside it;
// LOADS_AHEAD at a time, where they pass through registers.
template <int LOADS_AHEAD>
__device__ __forceinline__ void load_tile(
    const Window& shared_window, char* tiles, int buffer, int first_channel) {
    // Read once: nobody but us knows that copies don't change it.
    const Window window = shared_window;
#if COPIES
    const Load load = {window};
#elif LANDS
    const Load load = {window, find_landing(tiles)};
#else
    const Load<LOADS_AHEAD> load = {window};
#endif
    visit_columns(window, tiles + buffer, first_channel, load);
    commit_copies();
}

// Waits for what the thread has loaded of a chunk, so that its numbers are in the tile.
__device__ __forceinline__ void finish_tile(char* tiles, int buffer, int first_channel) {
    wait_for_copies<0>();
#if LANDS
    const Convert convert = {find_landing(tiles)};
    visit_columns(empty_window(), tiles + buffer, first_channel, convert);
#endif
}

// The thread's number in its team, and its team's.
__device__ __forceinline__ int find_member() {
    return TEAMS == 1 ? threadIdx.x : threadIdx.x % TEAM_THREADS;
}

__device__ __forceinline__ int find_team() {
    return TEAMS == 1 ? 0 : threadIdx.x / TEAM_THREADS;
}

// Where the thread's pixel lies, from the item's first on; negative if there is none.
__device__ __forceinline__ int find_offset(const Window& output, int pixel) {
    const int strip = divide(find_member(), LAYOUT.tiling.by_tile_w);
    const int x = find_member() - strip * LAYOUT.tiling.tile_w;
    const int y = strip * PIXELS + pixel;
    // What exists of the tile ends where the tile does, at the latest.
    if (!contains(output, y, x)) return -1;
    return y * LAYOUT.steps.write_row + x * LAYOUT.steps.write_column;
}

// The sums begin with the bias: at the end there would be no registers to load it into.
// In a cluster, one block's do.
__device__ __forceinline__ void begin_sums(
    const Arguments& a, const Part& part, Sums& sums) {
    sums = {};
    if (!a.bias || blockIdx.x % SPLITS) return;
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
    const Part part = find_part(item.part + find_team());
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

#if SPLITS > 1

// Stores a share. A thread's outputs lie side by side, or those of neighbouring threads do.
__device__ __forceinline__ void store_share(
    const Arguments& a, const Item& item, const Share& share) {
    const int offset = find_offset(item.output, 0);
    if (offset < 0) return;
    const Part part = find_part(item.part + find_team());
    const int first = blockIdx.x % SPLITS * OWN_OUTPUTS;
    Storage* write = a.write + item.output.offset + offset +
                     widening(part.first_output + first, LAYOUT.steps.write_channel);
    if (CHANNELS_LAST && OWN_OUTPUTS % QUAD == 0 && LAYOUT.store_quads) {
#pragma unroll
        for (int k = 0; k < OWN_OUTPUTS; k += QUAD) {
            if (first + k >= part.outputs) break;
            AccumulatorQuad quad;
#pragma unroll
            for (int i = 0; i < QUAD; ++i) quad.numbers[i] = share.of[k + i];
            store_quad(write + k, quad.numbers);
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < OWN_OUTPUTS; ++k) {
        if (first + k >= part.outputs) break;
        write[k * LAYOUT.steps.write_channel] = to_storage(share.of[k]);
    }
}

#endif

// Where the thread reads the tile for the first tap of its first pixel, in bytes. A thread
// behind the tile's end computes pixel 0 again; it isn't stored.
__device__ __forceinline__ int find_place() {
    const int strip = divide(find_member(), LAYOUT.tiling.by_tile_w);
    const int x = find_member() - strip * LAYOUT.tiling.tile_w;
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

// Adds a chunk's products to the sums. `piece` counts the chunks of all parts. Where there
// are registers, a chunk has sums of its own: rounding errors then grow with the number of
// chunks, plus that of a chunk's products.
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
#define FOR_ITEMS(number, end) \
    for (unsigned number = find_first(); number < (end); number += gridDim.x)

// Chunks that a block computes of an item, and the first one of them.
__device__ __forceinline__ int count_chunks() { return MANY_CHUNKS ? LAYOUT.own_chunks : 1; }

__device__ __forceinline__ int find_first_chunk() {
    return SPLITS == 1 ? 0 : blockIdx.x % SPLITS * LAYOUT.own_chunks;
}

// What the last warp does: it finds the next item while the others compute.
__device__ __forceinline__ void scout(const Arguments& a, unsigned end, Item* items) {
    int turn = 0;
    FOR_ITEMS(number, end) {
        // In the place of an item that all have left: they have met since.
        turn = turn == ITEMS - 1 ? 0 : turn + 1;
        if (threadIdx.x % WARP == 0 && number + gridDim.x < end) {
            find_item(a, number + gridDim.x, items[turn]);
        }
        __syncwarp();
        for (int chunk = 0; chunk < count_chunks(); ++chunk) {
            meet();
            if (!BUFFERED) meet();
        }
    }
}

#if SPLITS > 1
#define CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTER
#endif

extern "C" __global__ void CLUSTER __launch_bounds__((WARPS + 1) * WARP, RESIDENT)
    conv2d_baked(const Arguments a) {
    const unsigned end = find_end(a);
    if (find_first() >= end) return;
    SHARED_MEMORY(memory);
    Item* items = reinterpret_cast<Item*>(memory);
    char* tiles = memory + ITEMS * sizeof(Item);
    if (threadIdx.x == WARPS * WARP) find_item(a, find_first(), items[0]);
    const char* place = tiles + find_place();
    __syncthreads();
    if (threadIdx.x >= WARPS * WARP) {
        scout(a, end, items);
        return;
    }

    int buffer = 0;
    int turn = 0;
    const int first_chunk = find_first_chunk();
    load_tile<IN_FLIGHT>(items[0].input, tiles, 0, first_chunk * LAYOUT.chunk);
    FOR_ITEMS(number, end) {
        const Item& item = items[turn];
        turn = turn == ITEMS - 1 ? 0 : turn + 1;
        Sums sums;
        for (int own_chunk = 0; own_chunk < count_chunks(); ++own_chunk) {
            const int chunk = first_chunk + own_chunk;
            finish_tile(tiles, buffer, chunk * LAYOUT.chunk);
            meet();
            const bool goes_on = own_chunk + 1 < count_chunks();
            const bool loads = goes_on || number + gridDim.x < end;
            const Window& next = goes_on ? item.input : items[turn].input;
            const int next_channel = (goes_on ? chunk + 1 : first_chunk) * LAYOUT.chunk;
            const int next_buffer = BUFFERED ? LAYOUT.buffer - buffer : 0;
            // Nobody reads the other buffer any more.
            if (loads && (BUFFERED || LANDS)) {
                load_tile<IN_FLIGHT>(next, tiles, next_buffer, next_channel);
            }
            const int part = item.part + find_team();
            if (own_chunk == 0) begin_sums(a, find_part(part), sums);
            add_chunk(part * LAYOUT.chunks + chunk, place + buffer, sums);
            if (!BUFFERED) {
                meet();
                if (loads && !LANDS) {
                    load_tile<IN_FLIGHT_BESIDE_SUMS>(next, tiles, 0, next_channel);
                }
            }
            buffer = next_buffer;
        }
#if SPLITS > 1
        offer(tiles + LAYOUT.stage, sums);
        meet_cluster();
        Share share;
        collect(tiles + LAYOUT.stage, share);
        // This block's memory has to be there as long as others may read it.
        arrive_at_cluster();
        activate_share(tiles + LAYOUT.stage, share, a.activation);
        store_share(a, item, share);
        wait_for_cluster();
#else
        Accumulator* stage = reinterpret_cast<Accumulator*>(tiles + LAYOUT.stage);
        store(a, stage + threadIdx.x / WARP * WARP * STAGE_PITCH, item, sums);
#endif
    }
}
