// The words of CUDA C++ that kernels/ uses, for the host compiler.
//
// Included before the text of a function (g++ -include). Includes nothing itself: what
// is not declared here is not known inside a function, as with NVRTC, and a build takes
// a fraction of a second. What happens behind these words is in emulator.cpp.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct int2 { int x, y; } __align__(8);
struct int4 { int x, y, z, w; } __align__(16);
struct uint2 { unsigned x, y; } __align__(8);
struct uint3 { unsigned x, y, z; };
struct uint4 { unsigned x, y, z, w; } __align__(16);
struct float2 { float x, y; } __align__(8);
struct float4 { float x, y, z, w; } __align__(16);
struct double2 { double x, y; } __align__(16);
using dim3 = uint3;

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// Values are those of the running thread; the scheduler sets them at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

enum Collective { SYNCTHREADS, SYNCWARP, SHUFFLE, BALLOT, CLUSTER };

// Where a collective stands in the text. All who meet must stand at the same place.
struct Place {
    Collective collective;
    const char* file;
    int line;
};

char* shared_memory();
int lane();
void meet_block(Place place);
void arrive_at_cluster();
void wait_for_cluster(Place place);
// Where in another block's shared memory lies what is at `own` in this one's.
char* in_block(const void* own, int block);
// Every lane gives a value and receives the one that lane `source` gave.
unsigned long long meet_warp(
    Place place, unsigned mask, unsigned long long given, int source);
// Every lane gives a vote and receives the votes of all.
unsigned ballot(Place place, unsigned mask, bool vote);
// A copy arrives when the thread waits for its batch, and not before; zeros come from a
// source that doesn't exist.
void copy_async(void* to, const void* from, unsigned bytes, bool exists);
void commit_copies();
void wait_for_copies(unsigned latest);

template <class T>
T shuffle(Place place, unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8);
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    bits = meet_warp(place, mask, bits, source);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// Runs `function` with the argument struct that starts at `bytes`.
template <class Arguments>
void call(void (*function)(Arguments), const void* bytes) {
    Arguments arguments;
    __builtin_memcpy(&arguments, bytes, sizeof arguments);
    function(arguments);
}

template <class Arguments>
unsigned long argument_bytes(void (*)(Arguments)) {
    return sizeof(Arguments);
}

}  // namespace emulation

#define SHARED_MEMORY(name) char* const name = emulation::shared_memory()

// The default arguments are evaluated where the collective is called.
#define EMULATION_PLACE \
    const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_PLACE) {
    emulation::meet_block({emulation::SYNCTHREADS, file, line});
}

inline void arrive_at_cluster() { emulation::arrive_at_cluster(); }

inline void wait_for_cluster(EMULATION_PLACE) {
    emulation::wait_for_cluster({emulation::CLUSTER, file, line});
}

template <class T>
T* in_block(T* own, int block) {
    return reinterpret_cast<T*>(emulation::in_block(own, block));
}

inline void __syncwarp(unsigned mask = 0xffffffff, EMULATION_PLACE) {
    emulation::meet_warp({emulation::SYNCWARP, file, line}, mask, 0, emulation::lane());
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_PLACE) {
    const int first = emulation::lane() & ~(width - 1);
    return emulation::shuffle(
        {emulation::SHUFFLE, file, line}, mask, value, first + (source & (width - 1)));
}

template <class T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int width = 32, EMULATION_PLACE) {
    const int lane = emulation::lane();
    const int source = lane + static_cast<int>(delta);
    const bool inside = (lane & (width - 1)) + delta < static_cast<unsigned>(width);
    return emulation::shuffle(
        {emulation::SHUFFLE, file, line}, mask, value, inside ? source : lane);
}

template <class T>
T __shfl_up_sync(
    unsigned mask, T value, unsigned delta, int width = 32, EMULATION_PLACE) {
    const int lane = emulation::lane();
    const int source = lane - static_cast<int>(delta);
    const bool inside = static_cast<unsigned>(lane & (width - 1)) >= delta;
    return emulation::shuffle(
        {emulation::SHUFFLE, file, line}, mask, value, inside ? source : lane);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATION_PLACE) {
    const int lane = emulation::lane(), source = lane ^ bits;
    // A source in a later segment than one's own gives the lane's own value.
    const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
    return emulation::shuffle(
        {emulation::SHUFFLE, file, line}, mask, value, inside ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int vote, EMULATION_PLACE) {
    return emulation::ballot({emulation::BALLOT, file, line}, mask, vote != 0);
}

template <class T>
T __ldg(const T* address) {
    return *address;
}

template <class T>
void __stcg(T* address, T value) {
    *address = value;
}
template <class T>
void __stcs(T* address, T value) {
    *address = value;
}

inline void pause(int) {}

template <int BYTES>
void copy_async(void* shared, const void* global, bool exists) {
    emulation::copy_async(shared, global, BYTES, exists);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int BATCHES>
void wait_for_copies() {
    emulation::wait_for_copies(BATCHES);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}

#define EMULATION_MIN_MAX(type)                                       \
    inline type min(type a, type b) { return b < a ? b : a; }         \
    inline type max(type a, type b) { return a < b ? b : a; }
EMULATION_MIN_MAX(int)
EMULATION_MIN_MAX(unsigned)
EMULATION_MIN_MAX(long)
EMULATION_MIN_MAX(unsigned long)
EMULATION_MIN_MAX(long long)
EMULATION_MIN_MAX(unsigned long long)
#undef EMULATION_MIN_MAX

extern "C" {
#define EMULATION_MATH(name) \
    float name##f(float) noexcept; \
    double name(double) noexcept;
EMULATION_MATH(exp)
EMULATION_MATH(expm1)
EMULATION_MATH(tanh)
EMULATION_MATH(erf)
EMULATION_MATH(fabs)
EMULATION_MATH(sqrt)
#undef EMULATION_MATH
float fmaf(float, float, float) noexcept;
double fma(double, double, double) noexcept;
float fminf(float, float) noexcept;
float fmaxf(float, float) noexcept;
double fmin(double, double) noexcept;
double fmax(double, double) noexcept;
}

inline float exp(float x) { return expf(x); }
inline float expm1(float x) { return expm1f(x); }
inline float tanh(float x) { return tanhf(x); }
inline float erf(float x) { return erff(x); }
inline float fabs(float x) { return fabsf(x); }
inline float sqrt(float x) { return sqrtf(x); }
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
// As in CUDA, and unlike `a < b ? a : b`, these prefer a number to a NaN.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float half_to_float(unsigned short bits) {
    _Float16 half;
    __builtin_memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
}

inline unsigned short float_to_half(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short bits;
    __builtin_memcpy(&bits, &half, sizeof bits);
    return bits;
}

inline int __float_as_int(float value) {
    int bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __int_as_float(int bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
