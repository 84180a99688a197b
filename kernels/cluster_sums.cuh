// Sums of a cluster's blocks, each of which has its own share of the input channels: they
// are added, and every block gets those of some of the outputs.
//
// All blocks leave their sums in their shared memory, where the others read them; then a
// block has to stay until all have read. Knows the threads and sums of conv2d_baked.cu, and
// nothing of tiles.

#pragma once

#include "cluster.cuh"
#include "epilogue.cuh"

static_assert(PIXELS == 1 && OUTPUTS % SPLITS == 0, "Blocks finish equal shares.");

// Output channels of a thread that a block of the cluster finishes.
#define OWN_OUTPUTS (OUTPUTS / SPLITS)
// So many sums travel together.
#define PACKET (OWN_OUTPUTS % QUAD == 0 ? QUAD : 1)
#define PACKETS (OWN_OUTPUTS / PACKET)

struct alignas(PACKET * sizeof(Accumulator) < 16 ? sizeof(Accumulator) : 16) Packet {
    Accumulator numbers[PACKET];
};

// Where all who compute in the cluster's blocks meet. Threads that have left don't count.
__device__ __forceinline__ void meet_cluster() {
    arrive_at_cluster();
    wait_for_cluster();
}

// The thread's sums of the outputs that one of the blocks finishes. Neighbouring threads
// have neighbouring packets.
__device__ __forceinline__ Packet* find_packets(char* exchange, int block) {
    return reinterpret_cast<Packet*>(exchange) + block * PACKETS * WARPS * WARP + threadIdx.x;
}

// Leaves all sums where the cluster's blocks find them.
__device__ __forceinline__ void offer(char* exchange, const Sums& sums) {
#pragma unroll
    for (int block = 0; block < SPLITS; ++block) {
        Packet* packets = find_packets(exchange, block);
#pragma unroll
        for (int number = 0; number < PACKETS; ++number) {
            Packet packet;
#pragma unroll
            for (int i = 0; i < PACKET; ++i) {
                packet.numbers[i] = sums.of[block * OWN_OUTPUTS + number * PACKET + i];
            }
            packets[number * WARPS * WARP] = packet;
        }
    }
}

// The outputs of a thread that a block finishes.
struct Share {
    Accumulator of[OWN_OUTPUTS];
};

// Adds what the blocks offer, from this one on: no two read from the same one at a time, and
// an output is always added in the same order.
__device__ __forceinline__ void collect(char* exchange, Share& share) {
    const int own = blockIdx.x % SPLITS;
#pragma unroll
    for (int turn = 0; turn < SPLITS; ++turn) {
        const Packet* packets = find_packets(exchange, own);
        if (turn) packets = in_block(packets, (own + turn) % SPLITS);
#pragma unroll
        for (int number = 0; number < PACKETS; ++number) {
            const Packet packet = packets[number * WARPS * WARP];
#pragma unroll
            for (int i = 0; i < PACKET; ++i) {
                Accumulator& sum = share.of[number * PACKET + i];
                sum = turn ? sum + packet.numbers[i] : packet.numbers[i];
            }
        }
    }
}

// Applies the activation to a share. All but the shortest one are applied in memory, where
// the block's own sums have served, which it alone reads: their code stands there once.
__device__ __forceinline__ void activate_share(
    char* exchange, Share& share, int activation) {
    if (activation == RELU) {
#pragma unroll
        for (int k = 0; k < OWN_OUTPUTS; ++k) share.of[k] = activate(share.of[k], RELU);
    }
    if (activation <= RELU) return;
    Packet* packets = find_packets(exchange, blockIdx.x % SPLITS);
#pragma unroll
    for (int k = 0; k < OWN_OUTPUTS; ++k) {
        packets[k / PACKET * WARPS * WARP].numbers[k % PACKET] = share.of[k];
    }
#pragma unroll 1
    for (int k = 0; k < OWN_OUTPUTS; ++k) {
        Accumulator& number = packets[k / PACKET * WARPS * WARP].numbers[k % PACKET];
        number = activate(number, activation);
    }
#pragma unroll
    for (int k = 0; k < OWN_OUTPUTS; ++k) {
        share.of[k] = packets[k / PACKET * WARPS * WARP].numbers[k % PACKET];
    }
}
