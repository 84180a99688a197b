// Copies from global to shared memory that do not pass through registers.
//
// `copy_async<BYTES>` copies 4, 8 or 16 bytes, which lie aligned on both sides, or zeros
// instead if the source doesn't exist. `commit_copies` ends a batch of copies, and
// `wait_for_copies<BATCHES>` waits for all batches of the thread but so many of the latest.
// Where the hardware can't, the copy is done at once. The emulator brings its own. Knows
// nothing of tiles.

#pragma once

#include "prelude.cuh"

// Whether 16 bytes that are copied may leave the L2 cache before anything else does.
#ifndef STREAMS_IN
#define STREAMS_IN 0
#endif

#if defined(CUDA_EMULATION)
#elif __CUDA_ARCH__ >= 800

template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    // Of a source of no bytes nothing is read, wherever it lies; zeros fill the target.
    const int bytes = exists ? BYTES : 0;
    if (BYTES == 16 && STREAMS_IN) {
        // Made anew each time: it would take registers until the next tile is loaded.
        asm volatile(
            "{ .reg .b64 policy;\n"
            "createpolicy.fractional.L2::evict_first.b64 policy;\n"
            "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, policy; }" ::"r"(
                target),
            "l"(global), "r"(bytes)
            : "memory");
    } else if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target),
                     "l"(global), "r"(bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target),
                     "l"(global), "n"(BYTES), "r"(bytes)
                     : "memory");
    }
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int BATCHES>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(BATCHES) : "memory");
}

#else

template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
    const unsigned* source = static_cast<const unsigned*>(global);
    unsigned words[BYTES / 4];
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) words[i] = exists ? source[i] : 0u;
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) static_cast<unsigned*>(shared)[i] = words[i];
}

__device__ __forceinline__ void commit_copies() {}

template <int BATCHES>
__device__ __forceinline__ void wait_for_copies() {}

#endif
