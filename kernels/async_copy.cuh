// Copies from global to shared memory that do not pass through registers.
//
// `copy_async` copies 16 bytes, which lie aligned on both sides, `commit_copies` ends a
// batch of copies, and `wait_for_copies<BATCHES>` waits for all batches of the thread but
// so many of the latest. Where the hardware can't, the copy is done at once. The emulator
// brings its own. Knows nothing of tiles.

#pragma once

#include "prelude.cuh"

#if defined(CUDA_EMULATION)
#elif __CUDA_ARCH__ < 800

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
}

__device__ __forceinline__ void commit_copies() {}

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
