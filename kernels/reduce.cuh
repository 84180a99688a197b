// Sums over the lanes of a warp, several at a time.

#pragma once

#include "prelude.cuh"

// How many sums are made at once, and how many lanes then hold each of them.
#define SUMS 8
#define LANES_PER_SUM 4

// Adds each of the SUMS numbers over all lanes; returns that of number
// `lane / LANES_PER_SUM`. Lanes swap halves of what they hold, so that SUMS sums take 9
// shuffles and not 5 each.
__device__ __forceinline__ Accumulator sum_over_lanes(Accumulator (&numbers)[SUMS]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = SUMS / 2; half >= 1; half /= 2) {
        const int distance = half * LANES_PER_SUM;
        const bool upper = (lane & distance) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const Accumulator sent = upper ? numbers[i] : numbers[i + half];
            const Accumulator kept = upper ? numbers[i + half] : numbers[i];
            numbers[i] = kept + __shfl_xor_sync(FULL_MASK, sent, distance);
        }
    }
    Accumulator sum = numbers[0];
#pragma unroll
    for (int distance = LANES_PER_SUM / 2; distance >= 1; distance /= 2) {
        sum += __shfl_xor_sync(FULL_MASK, sum, distance);
    }
    return sum;
}
