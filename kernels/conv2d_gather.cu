// Forward pass and input gradient: out = activate(bias + sum of values * inputs).
//
// A block computes `passes * block_rows` output channels of SLOTS subtiles (see tile.cuh),
// `block_rows` at a time. Its warps form `row_warps` x `position_warps`: a warp owns up to
// ROWS channels and POSITIONS pixels a lane, in every slot. Input channels come in chunks;
// within a chunk a warp takes its rows one after another and a row's entries in batches:
// each lane decodes entries into pairs (place in the tile, value) in shared memory, then
// all lanes walk the pairs, reading POSITIONS Packs for each.
//
// Every 32 entries have their own partial sum, so that rounding errors grow with the
// number of partial sums and not with the number of entries.

#include "prelude.cuh"
#include "gather.cuh"
#include "tile.cuh"
#include "epilogue.cuh"

#ifndef POSITIONS
#define POSITIONS 4
#endif
#ifndef ROWS
#define ROWS 4
#endif
// Whether `passes` may be more than 1; compiled in, because the loop costs registers.
#ifndef MANY_PASSES
#define MANY_PASSES 0
#endif

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
    Geometry geometry;
    Tiling tiling;
    // Of one pair of row sets.
    int subtiles;
    Lattice lattice;
    Divisor by_block_rows;
    // What neighbouring threads store first: the block's channels (in quads, if those are
    // stored), or the staged pixels.
    Divisor by_stored_first;
    int activation;
    int chunk;
    int chunks;
    int row_groups;
    int subtile_groups;
    int row_warps;
    int warp_rows;
    // How often the block goes through the tile, with other rows each time.
    int passes;
    // Where outputs are staged, in bytes from the tile: on it, if it isn't needed again.
    int stage_begin;
    int stage_pitch;
    // Positions of a lane that are staged at a time.
    int stage_positions;
    // Whether QUAD channels are stored at a time: they lie side by side, aligned, and
    // the activation is none or relu.
    int quads;
    // Blocks from number `late_block` on start `delay` nanoseconds later. Blocks that
    // share a multiprocessor would otherwise load together, and store together, while
    // nobody uses the shared memory that bounds them.
    int late_block;
    int delay;
    Steps steps;
};

// Entries that a warp stages at a time: few stages, since each waits for memory.
#define STAGED (2 * WARP)

struct alignas(sizeof(Accumulator) * 2) Entry {
    Accumulator value;
    int offset;
};

// The part of shared memory in front of the tile.
struct Shared {
    Window* inputs;
    Window* outputs;
    Entry* entries;
    char* tile;
};

__device__ __forceinline__ Shared divide_shared_memory(char* memory) {
    Shared shared;
    shared.inputs = reinterpret_cast<Window*>(memory);
    shared.outputs = shared.inputs + SLOTS;
    shared.entries = reinterpret_cast<Entry*>(shared.outputs + SLOTS);
    shared.tile = reinterpret_cast<char*>(shared.entries + blockDim.x / WARP * STAGED);
    return shared;
}

// Stages a row's entries below index `limit`, from `cursor` on, at most STAGED; returns
// their number. Indices ascend, so that the wanted ones come first.
__device__ __forceinline__ int stage_entries(
    const Arguments& a, Entry* entries, int cursor, int end, int limit, int first_channel) {
    const int lane = threadIdx.x % WARP;
    int count = 0;
#pragma unroll
    for (int staged = 0; staged < STAGED; staged += WARP) {
        const int mine = cursor + staged + lane;
        const bool exists = mine < end;
        const int index = exists ? __ldg(a.indices + mine) : limit;
        Entry entry;
        entry.value = 0;
        // Not only the wanted ones, so that the value needn't wait for the index.
        if (exists) {
            const int place = a.order ? __ldg(a.order + mine) : mine;
            entry.value = to_accumulator(__ldg(a.values + place));
        }
        const bool wanted = index < limit;
        count += __popc(__ballot_sync(FULL_MASK, wanted));
        if (wanted) {
            entry.offset = entry_offset(index, first_channel, a.geometry, a.lattice) *
                           static_cast<int>(sizeof(Pack));
            entries[staged + lane] = entry;
        }
    }
    return count;
}

// Adds a row's entries below index `limit`, from `cursor` on; returns where it stopped.
__device__ __forceinline__ int add_entries(
    const Arguments& a, Entry* entries, const char* tile, const int (&places)[POSITIONS],
    int cursor, int end, int limit, int first_channel,
    Accumulator (&sums)[POSITIONS][SLOTS]) {
    while (cursor < end) {
        const int count = stage_entries(a, entries, cursor, end, limit, first_channel);
        __syncwarp();
        for (int first = 0; first < count; first += WARP) {
            const int last = min(count, first + WARP);
            Accumulator partial[POSITIONS][SLOTS] = {};
            // Twice: 59.2 us, 4 times: 60.4, once: 61.6 (11x11, 3 to 64 channels, 256x512,
            // density 0.1, on an H100).
#pragma unroll 2
            for (int i = first; i < last; ++i) {
                const Entry entry = entries[i];
#pragma unroll
                for (int j = 0; j < POSITIONS; ++j) {
                    Accumulator numbers[SLOTS];
                    unpack(
                        *reinterpret_cast<const Pack*>(tile + (places[j] + entry.offset)),
                        numbers);
#pragma unroll
                    for (int slot = 0; slot < SLOTS; ++slot) {
                        partial[j][slot] =
                            multiply_add(entry.value, numbers[slot], partial[j][slot]);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < POSITIONS; ++j) {
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) sums[j][slot] += partial[j][slot];
            }
        }
        cursor += count;
        __syncwarp();
        if (count < STAGED) break;
    }
    return cursor;
}

// Staged sums that a thread finishes at a time: their places are found once for all slots.
#define STORES 4

// Finishes and stores every slot's staged sums `first`, `first + blockDim.x`, ...
__device__ __forceinline__ void store_elements(
    const Arguments& a, const Shared& shared, int first, int elements, int first_position,
    int places, int first_channel, int channels) {
    const Accumulator* stage = reinterpret_cast<const Accumulator*>(shared.tile + a.stage_begin);
    int staged[STORES];
    int y[STORES];
    int x[STORES];
    // In bytes.
    long long offset[STORES];
    Accumulator bias[STORES];
#pragma unroll
    for (int u = 0; u < STORES; ++u) {
        const int element = first + u * blockDim.x;
        const int quotient = divide(element, a.by_stored_first);
        const int remainder = element - quotient * a.by_stored_first.divisor;
        const int channel = a.geometry.channels_last ? remainder : quotient;
        const int place = a.geometry.channels_last ? quotient : remainder;
        const bool wanted = (element < elements) & (channel < channels);
        const int position = first_position + place;
        y[u] = divide(position, a.tiling.by_tile_w);
        x[u] = position - y[u] * a.tiling.tile_w;
        staged[u] = wanted ? place * a.stage_pitch + channel : 0;
        offset[u] = (widening(y[u], a.steps.write_row) +
                     widening(x[u], a.steps.write_column) +
                     widening(first_channel + channel, a.steps.write_channel)) *
                    static_cast<int>(sizeof(Storage));
        // Outside every window.
        if (!wanted) y[u] = -1;
        bias[u] = 0;
        if (a.bias && wanted) bias[u] = to_accumulator(__ldg(a.bias + first_channel + channel));
    }
#pragma unroll 1
    for (int slot = 0; slot < SLOTS; ++slot) {
        const Window window = shared.outputs[slot];
        char* write = reinterpret_cast<char*>(a.write + window.offset);
        Accumulator sums[STORES];
#pragma unroll
        for (int u = 0; u < STORES; ++u) sums[u] = stage[staged[u]] + bias[u];
        stage += places * a.stage_pitch;
        // Not in the switch: a jump through a table costs more than all the rest.
        if (a.activation != LINEAR) {
#pragma unroll
            for (int u = 0; u < STORES; ++u) sums[u] = activate(sums[u], a.activation);
        }
#pragma unroll
        for (int u = 0; u < STORES; ++u) {
            // An output's window begins at 0.
            if ((static_cast<unsigned>(y[u]) < static_cast<unsigned>(window.y_count)) &
                (x[u] < window.x_count)) {
                *reinterpret_cast<Storage*>(write + offset[u]) = to_storage(sums[u]);
            }
        }
    }
}

// As `store_elements`, for one group of QUAD neighbouring channels.
__device__ __forceinline__ void store_quad(
    const Arguments& a, const Shared& shared, int element, int first_position, int places,
    int first_channel, int channels) {
    const Accumulator* stage = reinterpret_cast<const Accumulator*>(shared.tile + a.stage_begin);
    const int place = divide(element, a.by_stored_first);
    const int channel = (element - place * a.by_stored_first.divisor) * QUAD;
    if (channel >= channels) return;
    const int position = first_position + place;
    const int y = divide(position, a.tiling.by_tile_w);
    const int x = position - y * a.tiling.tile_w;
    const long long offset =
        (widening(y, a.steps.write_row) + widening(x, a.steps.write_column) +
         first_channel + channel) *
        static_cast<int>(sizeof(Storage));
    AccumulatorQuad bias = {};
#pragma unroll
    for (int c = 0; c < QUAD; ++c) {
        if (a.bias) bias.numbers[c] = to_accumulator(__ldg(a.bias + first_channel + channel + c));
    }
    stage += place * a.stage_pitch + channel;
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const Window& window = shared.outputs[slot];
        if ((y >= window.y_count) | (x >= window.x_count)) continue;
        AccumulatorQuad sums = *reinterpret_cast<const AccumulatorQuad*>(
            stage + slot * places * a.stage_pitch);
        StorageQuad stored;
#pragma unroll
        for (int c = 0; c < QUAD; ++c) {
            Accumulator sum = sums.numbers[c] + bias.numbers[c];
            if (a.activation == RELU) sum = activate(sum, RELU);
            stored.numbers[c] = to_storage(sum);
        }
        char* write = reinterpret_cast<char*>(a.write + window.offset);
        *reinterpret_cast<StorageQuad*>(write + offset) = stored;
    }
}

// Finishes the sums and stores them. They pass through shared memory, so that
// neighbouring threads write neighbouring memory, and so that the activation's code
// exists once and not once for every register.
__device__ __forceinline__ void store(
    const Arguments& a, const Shared& shared,
    const Accumulator (&sums)[ROWS][POSITIONS][SLOTS], int first_channel, int channels,
    int warp_row, int position_warps) {
    Accumulator* stage = reinterpret_cast<Accumulator*>(shared.tile + a.stage_begin);
    const int pixels = position_warps * WARP;
    const int places = a.stage_positions * pixels;
    const int pixel = threadIdx.x / WARP / a.row_warps * WARP + threadIdx.x % WARP;
    const int elements = places * a.by_block_rows.divisor;
    // One copy of the loop's body serves all positions: it is long.
#pragma unroll 1
    for (int first = 0; first < POSITIONS; first += a.stage_positions) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < POSITIONS * SLOTS; ++k) {
            const int j = k / SLOTS - first;
            if (j < 0 || j >= a.stage_positions) continue;
            const int place = k % SLOTS * places + j * pixels + pixel;
            Accumulator* target = stage + place * a.stage_pitch + warp_row;
            if (a.quads) {
#pragma unroll
                for (int r = 0; r < ROWS; r += QUAD) {
                    AccumulatorQuad quad;
#pragma unroll
                    for (int c = 0; c < QUAD; ++c) {
                        quad.numbers[c] = sums[r + c][k / SLOTS][k % SLOTS];
                    }
                    if (r < a.warp_rows) *reinterpret_cast<AccumulatorQuad*>(target + r) = quad;
                }
                continue;
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (r < a.warp_rows) target[r] = sums[r][k / SLOTS][k % SLOTS];
            }
        }
        __syncthreads();
        if (a.quads) {
            for (int e = threadIdx.x; e < elements / QUAD; e += blockDim.x) {
                store_quad(a, shared, e, first * pixels, places, first_channel, channels);
            }
            continue;
        }
        for (int e = threadIdx.x; e < elements; e += STORES * blockDim.x) {
            store_elements(a, shared, e, elements, first * pixels, places, first_channel,
                           channels);
        }
    }
}

__device__ __forceinline__ void find_windows(
    const Arguments& a, const Shared& shared, int set_h, int set_w, int subtile_group,
    int first_input) {
    if (threadIdx.x >= SLOTS) return;
    const int slot = threadIdx.x;
    shared.inputs[slot] = empty_window();
    shared.outputs[slot] = empty_window();
    Subtile subtile;
    const int number = subtile_group * SLOTS + slot;
    if (number < a.subtiles &&
        find_subtile(number, set_h, set_w, a.geometry, a.tiling, subtile)) {
        shared.inputs[slot] =
            input_window(a.read, subtile, first_input, a.geometry, a.lattice.extent_h,
                         a.lattice.extent_w, __ldg(a.origins + subtile.phase_h),
                         __ldg(a.origins + a.geometry.h.visited + subtile.phase_w));
        shared.outputs[slot] = output_window(a.write, subtile, a.geometry, a.tiling);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) conv2d_gather(const Arguments a) {
    SHARED_MEMORY(memory);
    const Shared shared = divide_shared_memory(memory);
    const Geometry& geometry = a.geometry;
    const int warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    const int position_warps = blockDim.x / WARP / a.row_warps;

    // Blocks that differ only in their rows are neighbours: they share what they read.
    const int block_rows = a.by_block_rows.divisor;
    const int block = blockIdx.x / a.row_groups;
    const int row_group = blockIdx.x % a.row_groups;
    const int pass_rows = (MANY_PASSES ? a.passes : 1) * block_rows;
    const int group_blocks = (geometry.group_out + pass_rows - 1) / pass_rows;
    const int group = row_group / group_blocks;
    const int set = block / a.subtile_groups;
    const int warp_row = warp % a.row_warps * a.warp_rows;

    find_windows(a, shared, set / geometry.w.row_sets, set % geometry.w.row_sets,
                 block % a.subtile_groups, group * geometry.group_in);
    if (blockIdx.x >= static_cast<unsigned>(a.late_block)) pause(a.delay);

    int places[POSITIONS];
#pragma unroll
    for (int j = 0; j < POSITIONS; ++j) {
        const int position = (j * position_warps + warp / a.row_warps) * WARP + lane;
        const int y = divide(position, a.tiling.by_tile_w);
        const int x = position - y * a.tiling.tile_w;
        // A position behind the tile's end computes position 0 again; it isn't stored.
        places[j] = y < a.tiling.tile_h
                        ? (y * geometry.h.stride * a.lattice.row_pitch + x) *
                              static_cast<int>(sizeof(Pack))
                        : 0;
    }

    const int first_row = row_group % group_blocks * pass_rows;
    const int last_row = min(first_row + pass_rows, geometry.group_out);
    bool loaded = false;
    for (int row_in_group = first_row; row_in_group < last_row; row_in_group += block_rows) {
        const int channels = min(block_rows, last_row - row_in_group);
        const int first_channel = group * geometry.group_out + row_in_group;
        const int rows = max(0, min(a.warp_rows, channels - warp_row));
        // Lane r keeps the state of the warp's row r.
        int cursor = 0;
        int end = 0;
        if (lane < rows) {
            const int row = set * geometry.out_channels + first_channel + warp_row + lane;
            cursor = __ldg(a.begin + row);
            end = __ldg(a.end + row);
        }

        Accumulator sums[ROWS][POSITIONS][SLOTS] = {};
        for (int chunk = 0; chunk < a.chunks; ++chunk) {
            const int first_input = chunk * a.chunk;
            const int inputs = min(a.chunk, geometry.group_in - first_input);
            const int limit = (first_input + inputs) * geometry.h.taps * geometry.w.taps;
            // A tile that holds all channels serves every pass.
            if (!loaded) {
                __syncthreads();
                load_tile(reinterpret_cast<Pack*>(shared.tile), shared.inputs, a.lattice,
                          a.steps.read_row, a.steps.read_column, a.steps.read_channel,
                          a.geometry.channels_last, first_input, inputs);
                __syncthreads();
                loaded = MANY_PASSES && a.chunks == 1;
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (r < rows) {
                    const int stopped = add_entries(
                        a, shared.entries + warp * STAGED, shared.tile, places,
                        __shfl_sync(FULL_MASK, cursor, r), __shfl_sync(FULL_MASK, end, r),
                        limit, first_input, sums[r]);
                    if (lane == r) cursor = stopped;
                }
            }
        }
        store(a, shared, sums, first_channel, channels, warp_row, position_warps);
        if (!MANY_PASSES) break;
    }
}
