// What happens to a finished sum before it is stored: the activations.
//
// The codes are those of the package's activation table. Knows no shapes.

#pragma once

#include "prelude.cuh"

#define LINEAR 0
#define RELU 1
#define RELU6 2
#define LEAKY_RELU 3
#define ELU 4
#define SIGMOID 5
#define TANH 6
#define GELU 7
#define SWISH 8

#if DTYPE == INT32

__device__ __forceinline__ Accumulator activate(Accumulator sum, int activation) {
    const int value = static_cast<int>(sum);
    if (activation == RELU || activation == RELU6) {
        if (value < 0) return 0;
        if (activation == RELU6 && value > 6) return 6;
    }
    return sum;
}

#else

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float exponential_minus_1(float x) { return expm1f(x); }
__device__ __forceinline__ double exponential_minus_1(double x) { return expm1(x); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }
__device__ __forceinline__ float error_function(float x) { return erff(x); }
__device__ __forceinline__ double error_function(double x) { return erf(x); }

// The comparisons are written so that NaN stays NaN.
__device__ __forceinline__ Accumulator activate(Accumulator x, int activation) {
    const Accumulator one = 1;
    switch (activation) {
        case RELU:
            return x < 0 ? 0 : x;
        case RELU6:
            return x < 0 ? 0 : (x > 6 ? 6 : x);
        case LEAKY_RELU:
            // TensorFlow keeps alpha in float32, for every dtype.
            return x < 0 ? static_cast<Accumulator>(0.2f) * x : x;
        case ELU:
            return x < 0 ? exponential_minus_1(x) : x;
        case SIGMOID:
            return one / (one + exponential(-x));
        case TANH:
            return hyperbolic_tangent(x);
        case GELU:
            return static_cast<Accumulator>(0.5) * x *
                   (one + error_function(x * static_cast<Accumulator>(0.70710678118654752440)));
        case SWISH:
            return x * (one / (one + exponential(-x)));
        default:
            return x;
    }
}

#endif
