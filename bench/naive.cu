// The method of the original operator: a list of nonzeros, one output a thread.
//
// y[n,p,q,k] = sum over the nonzeros (r,s,c) of output channel k:
//     x[n, p + r - before_r, q + s - before_s, c] * weight
//
// Stride 1, NHWC and HWIO, float32. The nonzeros of channel k are the places
// k * weights to k * weights + counts[k] - 1 of four arrays, where weights = R * S * C.
// Written as plainly as the method allows: the baseline to be beaten.

#ifndef CUDA_EMULATION
// By this symbol, `clear-cache` tells our compiled code from that of others.
extern "C" __device__ const char sparse_conv_marker = 1;
#endif

struct ToCooArguments {
    const float* kernel;
    int* counts;
    float* values;
    int* rows;
    int* columns;
    int* channels;
    int kernel_columns;
    int inputs;
    int outputs;
    int weights;
};

// Lists the nonzeros of a dense kernel; each thread those of one output channel.
extern "C" __global__ void naive_to_coo(ToCooArguments arguments) {
    const int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= arguments.outputs) return;
    const long long begin = static_cast<long long>(k) * arguments.weights;
    int count = 0;
    for (int i = 0; i < arguments.weights; ++i) {
        const float value =
            arguments.kernel[static_cast<long long>(i) * arguments.outputs + k];
        if (value == 0.0f) continue;
        const int tap = i / arguments.inputs;
        arguments.values[begin + count] = value;
        arguments.rows[begin + count] = tap / arguments.kernel_columns;
        arguments.columns[begin + count] = tap % arguments.kernel_columns;
        arguments.channels[begin + count] = i % arguments.inputs;
        ++count;
    }
    arguments.counts[k] = count;
}

struct ConvArguments {
    const float* x;
    float* y;
    const int* counts;
    const float* values;
    const int* rows;
    const int* columns;
    const int* channels;
    int height;
    int width;
    int inputs;
    int outputs;
    int weights;
    int before_rows;
    int before_columns;
    int row_blocks;
};

// A thread of the block is (column, row, output channel); blockIdx.y counts the blocks
// of rows of all images.
extern "C" __global__ void naive_conv2d(ConvArguments arguments) {
    const int image = blockIdx.y / arguments.row_blocks;
    const int row_block = blockIdx.y % arguments.row_blocks;
    const int p = row_block * blockDim.y + threadIdx.y;
    const int q = blockIdx.x * blockDim.x + threadIdx.x;
    const int k = blockIdx.z * blockDim.z + threadIdx.z;
    if (p >= arguments.height || q >= arguments.width || k >= arguments.outputs) return;
    const long long pixels = static_cast<long long>(arguments.height) * arguments.width;
    const float* x = arguments.x + image * pixels * arguments.inputs;
    const long long begin = static_cast<long long>(k) * arguments.weights;
    float sum = 0.0f;
    for (long long i = begin; i < begin + arguments.counts[k]; ++i) {
        const int h = p + arguments.rows[i] - arguments.before_rows;
        const int w = q + arguments.columns[i] - arguments.before_columns;
        if (h < 0 || h >= arguments.height || w < 0 || w >= arguments.width) continue;
        const long long pixel = static_cast<long long>(h) * arguments.width + w;
        sum += x[pixel * arguments.inputs + arguments.channels[i]] * arguments.values[i];
    }
    const long long pixel = image * pixels + static_cast<long long>(p) * arguments.width + q;
    arguments.y[pixel * arguments.outputs + k] = sum;
}
