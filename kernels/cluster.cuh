// Clusters: blocks that run at the same time and reach each other's shared memory.
//
// Every thread of a cluster that still runs arrives at its barrier and then waits, in turns.
// What one did before it arrived is done for all who have waited. A block's memory exists for
// the others after its threads have arrived for the first time, and as long as it runs. Only
// for hardware of compute capability 9.0 or later. The emulator brings its own. Knows nothing
// of tiles.

#pragma once

#include "prelude.cuh"

#ifndef CUDA_EMULATION

__device__ __forceinline__ void arrive_at_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// What lies in another block's shared memory where `own` lies in this one's.
template <class T>
__device__ __forceinline__ T* in_block(T* own, int block) {
    unsigned long long address;
    asm("mapa.u64 %0, %1, %2;"
        : "=l"(address)
        : "l"(reinterpret_cast<unsigned long long>(own)), "r"(block));
    return reinterpret_cast<T*>(address);
}

#endif
