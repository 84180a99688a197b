// Number types, conversions and the few words that differ between compilers.
//
// Knows how each dtype is stored, in what it is accumulated, and how several pixels are
// packed into one 16-byte shared memory access. Knows nothing about convolutions.

#pragma once

#define FLOAT16 1
#define BFLOAT16 2
#define FLOAT32 3
#define FLOAT64 4
#define INT32 5

#ifndef DTYPE
#define DTYPE FLOAT32
#endif

#define WARP 32
#define FULL_MASK 0xffffffffu

#ifndef CUDA_EMULATION

// By this symbol, `clear-cache` tells our compiled code from that of others.
extern "C" __device__ const char sparse_conv_marker = 1;

#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]

// Lets other warps work for about so many nanoseconds.
__device__ __forceinline__ void pause(int nanoseconds) { __nanosleep(nanoseconds); }

__device__ __forceinline__ float half_to_float(unsigned short half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

#endif

// Storage is what memory holds, Accumulator what sums are kept in. A Pack holds the same
// pixel of SLOTS tiles and is read from shared memory in one instruction.
#if DTYPE == FLOAT64
typedef double Storage;
typedef double Accumulator;
typedef double2 Pack;
#define SLOTS 2
#elif DTYPE == INT32
// Unsigned, because signed overflow has no meaning in C++ and must wrap around here.
typedef int Storage;
typedef unsigned Accumulator;
typedef uint4 Pack;
#define SLOTS 4
#else
#if DTYPE == FLOAT32
typedef float Storage;
#else
typedef unsigned short Storage;
#endif
typedef float Accumulator;
typedef float4 Pack;
#define SLOTS 4
#endif

union FloatBits {
    float value;
    unsigned bits;
};

__device__ __forceinline__ float bfloat16_to_float(unsigned short number) {
#ifndef CUDA_EMULATION
    // Not a shift: the compiler would move that to where the number is loaded, and wait.
    float value;
    asm("{ .reg .b16 low; mov.b16 low, 0; mov.b32 %0, {low, %1}; }"
        : "=f"(value)
        : "h"(number));
    return value;
#else
    FloatBits pun;
    pun.bits = static_cast<unsigned>(number) << 16;
    return pun.value;
#endif
}

// Rounds to the nearest, ties to even.
__device__ __forceinline__ unsigned short float_to_bfloat16(float value) {
#if !defined(CUDA_EMULATION) && __CUDA_ARCH__ >= 800
    unsigned short rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
#else
    FloatBits pun;
    pun.value = value;
    if (value != value) return static_cast<unsigned short>((pun.bits >> 16) | 0x40u);
    const unsigned odd = (pun.bits >> 16) & 1u;
    return static_cast<unsigned short>((pun.bits + 0x7fffu + odd) >> 16);
#endif
}

__device__ __forceinline__ Accumulator to_accumulator(Storage stored) {
#if DTYPE == FLOAT16
    return half_to_float(stored);
#elif DTYPE == BFLOAT16
    return bfloat16_to_float(stored);
#else
    return static_cast<Accumulator>(stored);
#endif
}

__device__ __forceinline__ Storage to_storage(Accumulator value) {
#if DTYPE == FLOAT16
    return float_to_half(value);
#elif DTYPE == BFLOAT16
    return float_to_bfloat16(value);
#else
    return static_cast<Storage>(value);
#endif
}

// Two numbers of 16 bits in a word, the first one in its lower half.
__device__ __forceinline__ unsigned to_storage_pair(Accumulator first, Accumulator second) {
#if !defined(CUDA_EMULATION) && __CUDA_ARCH__ >= 800 && DTYPE == FLOAT16
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#elif !defined(CUDA_EMULATION) && __CUDA_ARCH__ >= 800 && DTYPE == BFLOAT16
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return static_cast<unsigned>(to_storage(first)) |
           static_cast<unsigned>(to_storage(second)) << 16;
#endif
}

// Both zeros are zero, NaN is not.
__device__ __forceinline__ bool is_zero(Storage stored) {
#if DTYPE == FLOAT16 || DTYPE == BFLOAT16
    return (stored & 0x7fffu) == 0;
#else
    return stored == 0;
#endif
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
    return fmaf(a, b, c);
}

__device__ __forceinline__ double multiply_add(double a, double b, double c) {
    return fma(a, b, c);
}

__device__ __forceinline__ unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
    return a * b + c;
}

__device__ __forceinline__ Pack make_pack(const Accumulator (&numbers)[SLOTS]) {
    Pack pack;
    pack.x = numbers[0];
    pack.y = numbers[1];
#if SLOTS == 4
    pack.z = numbers[2];
    pack.w = numbers[3];
#endif
    return pack;
}

__device__ __forceinline__ void unpack(const Pack& pack, Accumulator (&numbers)[SLOTS]) {
    numbers[0] = pack.x;
    numbers[1] = pack.y;
#if SLOTS == 4
    numbers[2] = pack.z;
    numbers[3] = pack.w;
#endif
}

// Four neighbouring numbers, moved in as few instructions as the hardware allows.
#define QUAD 4

struct alignas(16) AccumulatorQuad {
    Accumulator numbers[QUAD];
};

struct alignas(sizeof(Storage) * QUAD < 16 ? sizeof(Storage) * QUAD : 16) StorageQuad {
    Storage numbers[QUAD];
};

// Whether what is stored by quads may leave the L2 cache before anything else does.
#ifndef STREAMS_OUT
#define STREAMS_OUT 0
#endif
#if STREAMS_OUT
#define STORE_WHOLE __stcs
#else
#define STORE_WHOLE __stcg
#endif

// Stores four numbers at an address that is aligned for a StorageQuad. The intrinsics stay
// one instruction; a plain assignment may be compiled into four.
__device__ __forceinline__ void store_quad(Storage* to, const Accumulator (&from)[QUAD]) {
#if DTYPE == FLOAT64
    STORE_WHOLE(reinterpret_cast<double2*>(to), make_double2(from[0], from[1]));
    STORE_WHOLE(reinterpret_cast<double2*>(to) + 1, make_double2(from[2], from[3]));
#elif DTYPE == FLOAT32
    STORE_WHOLE(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
#elif DTYPE == INT32
    STORE_WHOLE(reinterpret_cast<uint4*>(to), make_uint4(from[0], from[1], from[2], from[3]));
#else
    STORE_WHOLE(reinterpret_cast<uint2*>(to), make_uint2(to_storage_pair(from[0], from[1]),
                                                         to_storage_pair(from[2], from[3])));
#endif
}

// A divisor known only at run time, for dividends from 0 to 2^31 - 1:
// magic = ceil(2^shift / divisor), shift = 31 + ceil(log2(divisor)).
struct Divisor {
    unsigned magic;
    int shift;
    int divisor;
};

__device__ __forceinline__ int divide(int dividend, const Divisor& by) {
    const unsigned long long product =
        static_cast<unsigned long long>(static_cast<unsigned>(dividend)) * by.magic;
    return static_cast<int>(product >> by.shift);
}

// The remainder; the quotient takes the dividend's place.
__device__ __forceinline__ int divide_on(int& dividend, const Divisor& by) {
    const int quotient = divide(dividend, by);
    const int remainder = dividend - quotient * by.divisor;
    dividend = quotient;
    return remainder;
}
