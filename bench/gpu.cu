// What the measurements run on a GPU beside convolutions: a gate, and a peak.
//
// Self-contained: a function takes one struct, as those in kernels/ do.

#ifndef CUDA_EMULATION
// By this symbol, `clear-cache` tells our compiled code from that of others.
extern "C" __device__ const char sparse_conv_marker = 1;
#endif

// Enough independent chains to hide the latency of an FMA on every architecture.
#define CHAINS 8

struct GateArguments {
    long long hold_ns;
};

// Keeps its stream busy, so that what is enqueued behind it starts later, all at once.
extern "C" __global__ void bench_gate(GateArguments arguments) {
    long long begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - begin < arguments.hold_ns);
}

struct PeakArguments {
    float* out;
    long long rounds;
};

// CHAINS FMAs a round in each thread; `out` has one element for each thread.
extern "C" __global__ void bench_peak(PeakArguments arguments) {
    float sums[CHAINS];
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) sums[i] = static_cast<float>(threadIdx.x + i);
    // Neither is known to the compiler, and the sums stay finite.
    const float factor = 1.0f / static_cast<float>(blockDim.x + 1);
    for (long long round = 0; round < arguments.rounds; ++round) {
#pragma unroll
        for (int i = 0; i < CHAINS; ++i) sums[i] = fmaf(sums[i], factor, factor);
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) total += sums[i];
    arguments.out[static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x] = total;
}
