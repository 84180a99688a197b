// Copies from global to shared memory that do not pass through registers.
//
// Where the hardware has none, the copy is done at once. Knows nothing of tiles.

#pragma once

#include "prelude.cuh"

#define COPY_BYTES 16

#if defined(CUDA_EMULATION) || __CUDA_ARCH__ < 800

struct alignas(COPY_BYTES) CopyUnit {
    unsigned words[COPY_BYTES / 4];
};

// Copies COPY_BYTES, which lie aligned on both sides.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    *static_cast<CopyUnit*>(shared) = *static_cast<const CopyUnit*>(global);
}

// Ends a batch of copies.
__device__ __forceinline__ void commit_copies() {}

// Waits for all batches of this thread but the `BATCHES` latest.
template <int BATCHES>
__device__ __forceinline__ void wait_for_copies() {}

#else

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int BATCHES>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(BATCHES) : "memory");
}

#endif
