/* Rounding to 8 bits in float32 (fake quantisation), and its gradient. */
#include <math.h>

#include "kernels.h"

/* The integer that stands for a value, before it is clipped to what 8 bits hold. */
INLINE float unclipped(float value, float inverse, float zero_point) {
    return nearbyintf(value * inverse) + zero_point;
}

/* y = scale * (clip(round(x / scale) + zero_point, low, high) - zero_point), count values. */
void fake_quantize(const float *x, float *y, long count, float scale, float zero_point, float low,
                   float high, int num_threads) {
    float inverse = 1.f / scale;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long i = 0; i < count; i++) {
        float q = unclipped(x[i], inverse, zero_point);
        q = q > low ? q : low; /* so that what is not a number becomes low, as in PyTorch */
        q = q < high ? q : high;
        y[i] = (q - zero_point) * scale;
    }
}

/* The gradient g of y where x was not clipped, else 0. */
void fake_quantize_back(const float *x, const float *g, float *result, long count, float scale,
                        float zero_point, float low, float high, int num_threads) {
    float inverse = 1.f / scale;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long i = 0; i < count; i++) {
        float q = unclipped(x[i], inverse, zero_point);
        result[i] = (q >= low) & (q <= high) ? g[i] : 0.f;
    }
}
