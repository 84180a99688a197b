// A dense HWIO kernel -> its sparse rows, each in slots of its own.
//
// Row i owns the slots from i * row_length on. A block takes `block_rows` rows. Its threads
// are dealt to them in turn; each takes a part of its row's length, counts the nonzeros
// there, and then writes them behind those of the parts before.

#include "prelude.cuh"
#include "gather.cuh"

struct Arguments {
    const Storage* kernel;
    // The kernel's row (then column) for each set and tap, or -1.
    const int* taps;
    int* begin;
    int* end;
    int* indices;
    Storage* values;
    Geometry geometry;
    int rows;
    int block_rows;
    int kernel_width;
    int kernel_channels;
    int kernel_outputs;
    // Whether rows are input channels of the kernel: the input gradient.
    int transposed;
};

struct Row {
    int set_h;
    int set_w;
    int channel;
};

// The weight of a row at this index; 0 where the kernel has none.
__device__ __forceinline__ Storage weight(const Arguments& a, const Row& row, int index) {
    const Geometry& geometry = a.geometry;
    const int line = divide(index, geometry.by_taps_w);
    const int tap_w = index - line * geometry.w.taps;
    const int channel = divide(line, geometry.by_taps_h);
    const int tap_h = line - channel * geometry.h.taps;
    const int r = __ldg(a.taps + row.set_h * geometry.h.taps + tap_h);
    const int s = __ldg(a.taps + geometry.h.row_sets * geometry.h.taps +
                        row.set_w * geometry.w.taps + tap_w);
    if (r < 0 || s < 0) return 0;
    int kernel_channel = channel;
    int output = row.channel;
    if (a.transposed) {
        const int group = row.channel / geometry.group_out;
        kernel_channel = row.channel - group * geometry.group_out;
        output = group * geometry.group_in + channel;
    }
    const long long place = static_cast<long long>(r) * a.kernel_width + s;
    return __ldg(a.kernel + (place * a.kernel_channels + kernel_channel) * a.kernel_outputs +
                 output);
}

extern "C" __global__ void __launch_bounds__(1024) compress(const Arguments a) {
    SHARED_MEMORY(memory);
    int* counts = reinterpret_cast<int*>(memory);
    const Geometry& geometry = a.geometry;
    const int row_in_block = threadIdx.x % a.block_rows;
    const int part = threadIdx.x / a.block_rows;
    const int parts = blockDim.x / a.block_rows;
    const int number = blockIdx.x * a.block_rows + row_in_block;
    const int row_length = geometry.group_in * geometry.h.taps * geometry.w.taps;
    const int part_length = (row_length - 1) / parts + 1;
    // In this order no product exceeds the row's length by more than a part.
    const int first = part < (row_length - 1) / part_length + 1 ? part * part_length
                                                                : row_length;
    const int last =
        number < a.rows ? first + min(part_length, row_length - first) : first;
    const int set = number / geometry.out_channels;
    const Row row = {set / geometry.w.row_sets, set % geometry.w.row_sets,
                     number % geometry.out_channels};

    int count = 0;
#pragma unroll 4
    for (int index = first; index < last; ++index) {
        count += is_zero(weight(a, row, index)) ? 0 : 1;
    }
    counts[threadIdx.x] = count;
    __syncthreads();

    if (number >= a.rows) return;
    const int begin = number * row_length;
    int slot = begin;
#pragma unroll 8
    for (int other = 0; other < part; ++other) {
        slot += counts[other * a.block_rows + row_in_block];
    }
    if (part == 0) a.begin[number] = begin;
    if (part == parts - 1) a.end[number] = slot + count;
#pragma unroll 4
    for (int index = first; index < last; ++index) {
        const Storage value = weight(a, row, index);
        if (is_zero(value)) continue;
        a.indices[slot] = index;
        a.values[slot] = value;
        ++slot;
    }
}
