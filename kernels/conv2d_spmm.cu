// Forward pass and input gradient as the product of a sparse matrix, the kernel's rows,
// with the windows of the input.
//
// A block computes `row_warps * warp_rows` output channels of a tile of pixels. The warps
// that compute form `row_warps` x `slices`: those of a slice have every channel of the
// block once, up to ROWS a warp, and a lane has POSITIONS pixels. The slices divide each
// row's entries among them, and add their sums in the end: so a block keeps all its warps
// busy with few channels and few pixels, as small images have them.
//
// Input channels come in chunks. LOADERS warps more than compute bring the next one into
// shared memory meanwhile, and the entries of it, which place_entries.cu has put together:
// their weights, and where they read. The first one is loaded by all. Sums stay in
// registers.
//
// A tile has one phase of one image, or of several small ones. Its planes hold what is
// read around the outputs, too; zeros at the end of a row may be those in front of the
// next (see spmm.py).
//
// An entry is read by all lanes at once, and then an input for each pixel: shared memory
// is the bound, as in Sputnik (T. Gale et al., https://arxiv.org/abs/2006.10901).

#include "prelude.cuh"
#include "gather.cuh"
#include "tile.cuh"
#include "epilogue.cuh"
#include "async_copy.cuh"
#include "spmm_entries.cuh"

#ifndef POSITIONS
#define POSITIONS 2
#endif
#ifndef ROWS
#define ROWS 4
#endif
// Warps that load, and warps that compute, at most.
#define LOADERS 8
#define MAX_WARPS 16

struct Arguments {
    const Storage* read;
    // What place_entries.cu has written: those of a block's rows in a chunk are `pieces`
    // pieces.
    const Piece* entries;
    const Storage* bias;
    const int* origins;
    Storage* write;
    Geometry geometry;
    Tiling tiling;
    int images;
    // Of a tile, at most.
    int tile_images;
    // Of one pair of row sets.
    int tiles;
    // From one image of a tile to the next, in accumulators, and in rows of the lattice;
    // those that follow are the next image's, too.
    int image_pitch;
    int image_rows;
    // Outputs of a row of a tile, at most; lanes may be more.
    int width;
    // Pitches in accumulators.
    Lattice lattice;
    Divisor by_block_rows;
    // Over the pixels of an image in a tile, and of all of them.
    Divisor by_area;
    Divisor by_pixels;
    // Threads that load neighbouring channels of a pixel.
    Divisor by_channel_threads;
    int activation;
    int chunk;
    int chunks;
    int row_groups;
    int row_warps;
    int warp_rows;
    // Slices are a power of 2: its exponent.
    int slices_log2;
    // Entries of a block and a chunk, at most, in quads.
    int capacity;
    int pieces;
    // From one buffer to the next, in bytes: a tile, entries, and the rows' spans.
    int buffer;
    // From one row to the next where sums are added, in accumulators.
    int stage_pitch;
    // Where the buffers begin, in bytes from the first cell on.
    int cells;
    // Whether QUAD channels are loaded at once, if they are aligned, and stored.
    int load_quads;
    int store_quads;
    Steps steps;
};

// A place of a tile in which there is input: where it is read from, in elements from the
// window's origin on, and where it goes in the buffer, in bytes.
struct Cell {
    int from;
    int to;
};

struct Buffer {
    char* tile;
    Entries* entries;
    Span* spans;
};

__device__ __forceinline__ Buffer find_buffer(const Arguments& a, char* buffers, int chunk) {
    const int tile = a.chunk * a.lattice.plane_pitch * static_cast<int>(sizeof(Accumulator));
    Buffer buffer;
    buffer.tile = buffers + chunk % 2 * a.buffer;
    buffer.entries = reinterpret_cast<Entries*>(buffer.tile + (tile + 15) / 16 * 16);
    buffer.spans = reinterpret_cast<Span*>(buffer.entries + a.capacity);
    return buffer;
}

// How a thread loads: every `cells_at_once`-th cell of a tile, from `cell` on, and of it
// every `at_once`-th channel, or quad, of a chunk, from `channel` on.
struct Share {
    int cell;
    int cells_at_once;
    int channel;
    int at_once;
};

// That of one thread of several.
__device__ __forceinline__ Share find_share(const Arguments& a, int thread, int threads) {
    Share share;
    share.cell = divide(thread, a.by_channel_threads);
    share.cells_at_once = divide(threads, a.by_channel_threads);
    share.at_once = a.by_channel_threads.divisor;
    share.channel = thread - share.cell * share.at_once;
    return share;
}

// What a block reads and what it writes of its first image, and how many images it has;
// nothing, if its phase has no outputs.
struct Windows {
    Window input;
    Window output;
    int images;
};

__device__ __forceinline__ Windows find_windows(
    const Arguments& a, int set, int number, int first_input) {
    const Geometry& geometry = a.geometry;
    const int set_h = set / geometry.w.row_sets;
    const int set_w = set % geometry.w.row_sets;
    Windows windows = {empty_window(), empty_window(), 0};
    Subtile subtile;
    if (find_subtile(number, set_h, set_w, geometry, a.tiling, subtile)) {
        subtile.image *= a.tile_images;
        windows.images = min(a.tile_images, a.images - subtile.image);
        windows.input =
            input_window(a.read, subtile, first_input, geometry, a.lattice.extent_h,
                         a.lattice.extent_w, __ldg(a.origins + subtile.phase_h),
                         __ldg(a.origins + geometry.h.visited + subtile.phase_w));
        windows.output = output_window(a.write, subtile, geometry, a.tiling);
    }
    return windows;
}

// Lists the cells of the tile, and puts zeros where there is no input: in both buffers, for
// all chunks. The margins of neighbouring rows, and images, may share their places.
__device__ __forceinline__ void list_cells(
    const Arguments& a, const Share& share, const Windows& windows, Cell* cells,
    char* buffers) {
    const Window& window = windows.input;
    const int places = a.lattice.extent_h * a.lattice.extent_w;
    for (int place = share.cell; place < places * a.tile_images;
         place += share.cells_at_once) {
        const int image = place / places;
        const int y = divide(place - image * places, a.lattice.by_extent_w);
        const int x = place - image * places - y * a.lattice.extent_w;
        const int quotient = divide(x, a.lattice.by_stride_w);
        const int remainder = x - quotient * a.lattice.by_stride_w.divisor;
        const int word = image * a.image_pitch + y * a.lattice.row_pitch +
                         remainder * a.lattice.columns + quotient;
        Cell cell;
        cell.from = image * static_cast<int>(a.geometry.read.image) +
                    y * a.steps.read_row + x * a.steps.read_column;
        cell.to = word * static_cast<int>(sizeof(Accumulator));
        if (contains(window, y, x)) {
            const int number =
                (image * window.y_count + y - window.y_begin) * window.x_count + x -
                window.x_begin;
            if (share.channel == 0) cells[number] = cell;
            continue;
        }
        // Each is written once: as the next image's, or the next row's.
        const bool last = image == a.tile_images - 1;
        const bool apart = a.image_pitch > a.image_rows * a.lattice.row_pitch;
        const bool next_image = (y >= a.image_rows) & !last;
        const bool next_row = (word - image * a.image_pitch >= (y + 1) * a.lattice.row_pitch) &
                              !((last | apart) & (y == a.lattice.extent_h - 1));
        if (next_image | next_row) continue;
        for (int channel = share.channel; channel < a.chunk; channel += share.at_once) {
            char* to = buffers + cell.to +
                       channel * a.lattice.plane_pitch * static_cast<int>(sizeof(Accumulator));
            *reinterpret_cast<Accumulator*>(to) = 0;
            if (a.chunks > 1) *reinterpret_cast<Accumulator*>(to + a.buffer) = 0;
        }
    }
}

// Loads neighbouring numbers, four of them at an address that is aligned for a StorageQuad.
// As for `store_quad`, the intrinsics stay one instruction.
__device__ __forceinline__ void load_unit(const Storage* from, Storage (&to)[1]) {
    to[0] = __ldg(from);
}

__device__ __forceinline__ void load_unit(const Storage* from, Storage (&to)[QUAD]) {
#if DTYPE == FLOAT64
    const double2 first = __ldg(reinterpret_cast<const double2*>(from));
    const double2 second = __ldg(reinterpret_cast<const double2*>(from) + 1);
    to[0] = first.x;
    to[1] = first.y;
    to[2] = second.x;
    to[3] = second.y;
#elif DTYPE == FLOAT16 || DTYPE == BFLOAT16
    const uint2 pairs = __ldg(reinterpret_cast<const uint2*>(from));
    to[0] = static_cast<Storage>(pairs.x);
    to[1] = static_cast<Storage>(pairs.x >> 16);
    to[2] = static_cast<Storage>(pairs.y);
    to[3] = static_cast<Storage>(pairs.y >> 16);
#elif DTYPE == FLOAT32
    const float4 quad = __ldg(reinterpret_cast<const float4*>(from));
    to[0] = quad.x;
    to[1] = quad.y;
    to[2] = quad.z;
    to[3] = quad.w;
#else
    const int4 quad = __ldg(reinterpret_cast<const int4*>(from));
    to[0] = quad.x;
    to[1] = quad.y;
    to[2] = quad.z;
    to[3] = quad.w;
#endif
}

// What a thread loads next, of a chunk.
struct Next {
    int cell;
    int channel;
};

// Loads UNIT neighbouring channels of each of BATCH cells. Through registers: copies to
// places as scattered as these take four times as long.
template <int UNIT, int BATCH>
__device__ __forceinline__ void load_batch(
    const Arguments& a, const Share& share, const Cell* cells, int count,
    const Storage* origin, char* tile, Next& next) {
    const int plane = a.lattice.plane_pitch * static_cast<int>(sizeof(Accumulator));
    Cell batch[BATCH];
    Storage units[BATCH][UNIT];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        batch[i] = cells[next.cell];
        batch[i].from += next.channel * a.steps.read_channel;
        batch[i].to += next.channel * plane;
        next.cell += share.cells_at_once;
        if (next.cell >= count) {
            next.cell = share.cell;
            next.channel += share.at_once * UNIT;
        }
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) load_unit(origin + batch[i].from, units[i]);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
#pragma unroll
        for (int k = 0; k < UNIT; ++k) {
            *reinterpret_cast<Accumulator*>(tile + (batch[i].to + k * plane)) =
                to_accumulator(units[i][k]);
        }
    }
}

// Loads the thread's share of a chunk of channels, UNIT neighbouring ones at a time.
template <int UNIT>
__device__ __forceinline__ void load_inputs(
    const Arguments& a, const Share& share, const Windows& windows, const Cell* cells,
    char* tile, int first_channel) {
    const int channels = min(a.chunk, a.geometry.group_in - first_channel);
    const Window& window = windows.input;
    const int count = windows.images * window.y_count * window.x_count;
    Next next = {share.cell, share.channel * UNIT};
    if (next.cell >= count || next.channel >= channels) return;
    int left = (count - 1 - next.cell) / share.cells_at_once + 1;
    left *= (channels - 1 - next.channel) / (share.at_once * UNIT) + 1;
    const Storage* origin =
        window.origin + widening(first_channel, a.steps.read_channel);
    for (; left >= 8; left -= 8) {
        load_batch<UNIT, 8>(a, share, cells, count, origin, tile, next);
    }
    if (left >= 4) load_batch<UNIT, 4>(a, share, cells, count, origin, tile, next);
    if (left % 4 >= 2) load_batch<UNIT, 2>(a, share, cells, count, origin, tile, next);
    if (left % 2) load_batch<UNIT, 1>(a, share, cells, count, origin, tile, next);
}

// Copies the entries of a chunk, and their spans.
__device__ __forceinline__ void copy_entries(
    const Arguments& a, const Piece* from, int thread, int threads, const Buffer& buffer) {
    Piece* to = reinterpret_cast<Piece*>(buffer.entries);
    for (int i = thread; i < a.pieces; i += threads) {
        copy_async<sizeof(Piece)>(to + i, from + i, true);
    }
}

// Adds one entry's products.
__device__ __forceinline__ void add_entry(
    const char* const (&places)[POSITIONS], Accumulator weight, int offset,
    Accumulator (&sums)[POSITIONS]) {
#pragma unroll
    for (int j = 0; j < POSITIONS; ++j) {
        const Accumulator input = *reinterpret_cast<const Accumulator*>(places[j] + offset);
        sums[j] = multiply_add(weight, input, sums[j]);
    }
}

// Adds a row's entries, the next of which are read meanwhile.
__device__ __forceinline__ void add_row(
    const char* const (&places)[POSITIONS], const Entries* entries, int count,
    Accumulator (&sums)[POSITIONS]) {
    if (count <= 0) return;
    Entries own = *entries;
#pragma unroll 1
    for (; count > QUAD; count -= QUAD) {
        const Entries next = *++entries;
#pragma unroll
        for (int k = 0; k < QUAD; ++k) add_entry(places, own.weights[k], own.offsets[k], sums);
        own = next;
    }
#pragma unroll
    for (int k = 0; k < QUAD; ++k) {
        if (k < count) add_entry(places, own.weights[k], own.offsets[k], sums);
    }
}

// Puts the warp's sums where those of all slices are added.
__device__ __forceinline__ void stage(
    const Arguments& a, Accumulator* staged, int rows, int first_row, int slice,
    const Accumulator (&sums)[ROWS][POSITIONS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (r >= rows) break;
        Accumulator* row =
            staged + (slice * a.by_block_rows.divisor + first_row + r) * a.stage_pitch;
#pragma unroll
        for (int j = 0; j < POSITIONS; ++j) {
            const int pixel = j * WARP + threadIdx.x % WARP;
            if (pixel < a.by_pixels.divisor) row[pixel] = sums[r][j];
        }
    }
}

// What the loaders do in the end: they find where each pixel is written, from the window's
// first on; negative if it doesn't exist.
__device__ __forceinline__ void list_outputs(
    const Arguments& a, const Windows& windows, int* offsets) {
    const int first = threadIdx.x - (blockDim.x - LOADERS * WARP);
    for (int i = first; i < a.by_pixels.divisor; i += LOADERS * WARP) {
        const int image = divide(i, a.by_area);
        const int pixel = i - image * a.by_area.divisor;
        const int y = divide(pixel, a.tiling.by_tile_w);
        const int x = pixel - y * a.tiling.tile_w;
        const bool exists = contains(windows.output, y, x) & (image < windows.images);
        const int place = image * static_cast<int>(a.geometry.write.image) +
                          y * a.steps.write_row + x * a.steps.write_column;
        offsets[i] = exists ? place : -1;
    }
}

// A sum of all slices, with the bias, finished.
__device__ __forceinline__ Accumulator finish(
    const Arguments& a, const Accumulator* staged, int channel) {
    Accumulator sum = a.bias ? to_accumulator(__ldg(a.bias + channel)) : Accumulator(0);
    const int to_next = a.by_block_rows.divisor * a.stage_pitch;
    for (int slice = 0; slice < 1 << a.slices_log2; ++slice) sum += staged[slice * to_next];
    return a.activation == LINEAR ? sum : activate(sum, a.activation);
}

// Adds the slices' sums in their order, finishes and stores them; neighbouring threads
// write neighbouring memory.
__device__ __forceinline__ void store(
    const Arguments& a, const Accumulator* staged, long long origin, const int* offsets,
    int first_channel, int channels) {
    const int block_rows = a.by_block_rows.divisor;
    const int pixels = a.by_pixels.divisor;
    const int at_once = a.store_quads ? QUAD : 1;
    for (int e = threadIdx.x * at_once; e < block_rows * pixels; e += blockDim.x * at_once) {
        int row;
        int pixel;
        if (a.geometry.channels_last) {
            pixel = divide(e, a.by_block_rows);
            row = e - pixel * block_rows;
        } else {
            row = divide(e, a.by_pixels);
            pixel = e - row * pixels;
        }
        const int offset = offsets[pixel];
        if ((row >= channels) | (offset < 0)) continue;
        const Accumulator* from = staged + row * a.stage_pitch + pixel;
        Storage* write = a.write + origin + offset +
                         widening(first_channel + row, a.steps.write_channel);
        if (a.store_quads) {
            Accumulator sums[QUAD];
#pragma unroll
            for (int k = 0; k < QUAD; ++k) {
                sums[k] = finish(a, from + k * a.stage_pitch, first_channel + row + k);
            }
            store_quad(write, sums);
        } else {
            *write = to_storage(finish(a, from, first_channel + row));
        }
    }
}

// Where those who compute and those who load meet, each at a place of their own.
__device__ __forceinline__ void meet() {
#ifdef CUDA_EMULATION
    __syncthreads();
#else
    asm volatile("barrier.sync 1;" ::: "memory");
#endif
}

// Loads a chunk; `loaders` warps do, of which the thread's is number `loader`.
__device__ __forceinline__ void load_chunk(
    const Arguments& a, const Windows& windows, const Cell* cells, const Piece* entries,
    int chunk, int loader, int loaders, const Buffer& buffer) {
    const int thread = loader * WARP + threadIdx.x % WARP;
    copy_entries(a, entries + widening(chunk, a.pieces), thread, loaders * WARP, buffer);
    const Share share = find_share(a, thread, loaders * WARP);
    const int alignment = min(16, QUAD * static_cast<int>(sizeof(Storage)));
    if (a.load_quads && reinterpret_cast<unsigned long long>(a.read) % alignment == 0) {
        load_inputs<QUAD>(a, share, windows, cells, buffer.tile, chunk * a.chunk);
    } else {
        load_inputs<1>(a, share, windows, cells, buffer.tile, chunk * a.chunk);
    }
    commit_copies();
    wait_for_copies<0>();
}

// What those do who compute: they add the entries of their rows, from `warp_row` on.
__device__ __forceinline__ void compute(
    const Arguments& a, char* buffers, int rows, int warp_row, int slice,
    Accumulator (&sums)[ROWS][POSITIONS]) {
    int places[POSITIONS];
#pragma unroll
    for (int j = 0; j < POSITIONS; ++j) {
        const int pixel = j * WARP + threadIdx.x % WARP;
        const int image = divide(pixel, a.by_area);
        const int y = divide(pixel - image * a.by_area.divisor, a.tiling.by_tile_w);
        const int x = pixel - image * a.by_area.divisor - y * a.tiling.tile_w;
        // A pixel behind the tile's or the row's end is another one again; it isn't stored.
        const int word = image * a.image_pitch +
                         y * a.geometry.h.stride * a.lattice.row_pitch +
                         min(x, a.width - 1);
        places[j] =
            image < a.tile_images ? word * static_cast<int>(sizeof(Accumulator)) : 0;
    }
    for (int chunk = 0; chunk < a.chunks; ++chunk) {
        const Buffer buffer = find_buffer(a, buffers, chunk);
        const char* in_tile[POSITIONS];
#pragma unroll
        for (int j = 0; j < POSITIONS; ++j) in_tile[j] = buffer.tile + places[j];
        meet();
        // All of them at once, before any is waited for.
        Span spans[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            spans[r] = buffer.spans[min(warp_row + r, a.by_block_rows.divisor - 1)];
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (r < rows) {
                const int quads = (spans[r].count + QUAD - 1) / QUAD;
                const int first = quads * slice >> a.slices_log2;
                const int end = quads * (slice + 1) >> a.slices_log2;
                const int count = min(spans[r].count, end * QUAD) - first * QUAD;
                add_row(in_tile, buffer.entries + spans[r].first + first, count, sums[r]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__((MAX_WARPS + LOADERS) * WARP, 1)
    conv2d_spmm(const Arguments a) {
    SHARED_MEMORY(memory);
    Cell* cells = reinterpret_cast<Cell*>(memory);
    int* offsets = reinterpret_cast<int*>(memory);
    char* buffers = memory + a.cells;
    const Geometry& geometry = a.geometry;
    const int warp = threadIdx.x / WARP;
    const int warps = blockDim.x / WARP;
    const int block_rows = a.by_block_rows.divisor;

    // Blocks that differ only in their rows are neighbours: they share what they read.
    const int block = blockIdx.x / a.row_groups;
    const int row_group = blockIdx.x % a.row_groups;
    const int group_blocks = (geometry.group_out + block_rows - 1) / block_rows;
    const int group = row_group / group_blocks;
    const int set = block / a.tiles;
    const int row_in_group = row_group % group_blocks * block_rows;
    const int channels = min(block_rows, geometry.group_out - row_in_group);
    const int first_channel = group * geometry.group_out + row_in_group;
    const Piece* entries =
        a.entries + widening(set * a.row_groups + row_group, a.chunks) * a.pieces;

    const Windows windows =
        find_windows(a, set, block % a.tiles, group * geometry.group_in);
    list_cells(a, find_share(a, threadIdx.x, blockDim.x), windows, cells, buffers);
    __syncthreads();
    load_chunk(a, windows, cells, entries, 0, warp, warps, find_buffer(a, buffers, 0));
    Accumulator* staged = reinterpret_cast<Accumulator*>(buffers);
    if (warp >= warps - LOADERS) {
        meet();
        for (int chunk = 1; chunk < a.chunks; ++chunk) {
            // Nobody reads any more what was two chunks before.
            load_chunk(a, windows, cells, entries, chunk, warp - (warps - LOADERS), LOADERS,
                       find_buffer(a, buffers, chunk));
            meet();
        }
        list_outputs(a, windows, offsets);
        meet();
    } else {
        const int slice = warp / a.row_warps;
        const int warp_row = warp % a.row_warps * a.warp_rows;
        const int rows = max(0, min(a.warp_rows, channels - warp_row));
        Accumulator sums[ROWS][POSITIONS] = {};
        compute(a, buffers, rows, warp_row, slice, sums);
        // Nobody needs the tiles any more.
        meet();
        stage(a, staged, rows, warp_row, slice, sums);
    }
    __syncthreads();
    store(a, staged, windows.output.offset, offsets, first_channel, channels);
}
