/* Depthwise convolution of channels-last pictures in float32 and its gradients, and sums and scaling
 * over the places of a picture: c channels, at least 16; odd kernels, padded to keep the sides.
 *
 * Weights are [kernel * kernel][c]. Sums are taken in one order, whichever thread takes them.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define SHARES 16 /* parts of a batch whose weight gradients are added up apart */
#define PLACES 32 /* places whose sum is taken apart, for its rounding */

#define TILE 4    /* outputs of a row that share each load of a tap */

/* A picture's channels of one vector with half a kernel of zeros around them, in the first-level cache
 * for small pictures: [h + kernel - 1][w + kernel - 1][LANES]. */
static float *padded(int h, int w, int kernel) {
    return calloc((long)(h + kernel - 1) * (w + kernel - 1) * LANES, sizeof(float));
}

INLINE float *place(float *scratch, int row, int column, int w, int kernel) {
    return scratch + ((long)row * (w + kernel - 1) + column) * LANES;
}

/* The scratch's inside from the channels at k of a picture x [h][w][c]. */
INLINE void take(const float *x, float *scratch, int h, int w, long c, int kernel) {
    for (int row = 0; row < h; row++) {
        float *to = place(scratch, row + kernel / 2, kernel / 2, w, kernel);
        for (int column = 0; column < w; column++)
            store(to + column * LANES, load(x + ((long)row * w + column) * c));
    }
}

/* One picture x [h][w][c] to y [ceil(h / stride)][ceil(w / stride)][c]. */
INLINE void filter(const float *x, const float *weight, float *y, float *scratch, int h, int w,
                   long c, int kernel, int stride) {
    int rows = (h + stride - 1) / stride, columns = (w + stride - 1) / stride;
    long line = (long)(w + kernel - 1) * LANES;
    for (long first = 0; first < c; first += LANES) {
        long k = channel(first, c);
        floats taps[kernel * kernel];
        for (int t = 0; t < kernel * kernel; t++) taps[t] = load(weight + t * c + k);
        take(x + k, scratch, h, w, c, kernel);
        for (int row = 0; row < rows; row++) {
            const float *from = scratch + row * stride * line;
            float *to = y + (long)row * columns * c + k;
            int column = 0;
            for (; column + TILE <= columns; column += TILE) {
                floats sums[TILE] = {{0}};
#pragma GCC unroll 25
                for (int t = 0; t < kernel * kernel; t++) {
                    const float *at = from + t / kernel * line + (column * stride + t % kernel) * LANES;
#pragma GCC unroll 4
                    for (int q = 0; q < TILE; q++) sums[q] += taps[t] * load(at + q * stride * LANES);
                }
                for (int q = 0; q < TILE; q++) store(to + (column + q) * c, sums[q]);
            }
            for (; column < columns; column++) {
                floats sum = {0};
                for (int t = 0; t < kernel * kernel; t++)
                    sum += taps[t] *
                           load(from + t / kernel * line + (column * stride + t % kernel) * LANES);
                store(to + column * c, sum);
            }
        }
    }
}

/* One picture's gradient dx [h][w][c] of dy, for any stride: every output's to the inputs it read. */
INLINE void filter_back(const float *dy, const float *weight, float *dx, float *scratch, int h,
                        int w, long c, int kernel, int stride) {
    int rows = (h + stride - 1) / stride, columns = (w + stride - 1) / stride;
    long line = (long)(w + kernel - 1) * LANES;
    for (long first = 0; first < c; first += LANES) {
        long k = channel(first, c);
        memset(scratch, 0, sizeof(float) * line * (h + kernel - 1));
        for (int row = 0; row < rows; row++)
            for (int column = 0; column < columns; column++) {
                floats g = load(dy + ((long)row * columns + column) * c + k);
                float *to = scratch + row * stride * line + column * stride * LANES;
                for (int t = 0; t < kernel * kernel; t++) {
                    float *at = to + t / kernel * line + t % kernel * LANES;
                    store(at, load(at) + g * load(weight + t * c + k));
                }
            }
        for (int row = 0; row < h; row++) {
            const float *from = place(scratch, row + kernel / 2, kernel / 2, w, kernel);
            for (int column = 0; column < w; column++)
                store(dx + ((long)row * w + column) * c + k, load(from + column * LANES));
        }
    }
}

/* One picture's part [kernel * kernel][c] of the weight gradient. */
INLINE void filter_weights(const float *x, const float *dy, float *part, float *scratch, int h,
                           int w, long c, int kernel, int stride) {
    int rows = (h + stride - 1) / stride, columns = (w + stride - 1) / stride;
    long line = (long)(w + kernel - 1) * LANES;
    /* As many rows of the kernel at a time as have their sums in registers. */
    int together = kernel * kernel <= (LANES == 16 ? 25 : 12) ? kernel : 1;
    for (long first = 0; first < c; first += LANES) {
        long k = channel(first, c);
        take(x + k, scratch, h, w, c, kernel);
        for (int i = 0; i < kernel; i += together) {
            int count = together * kernel;
            floats sums[count];
            for (int t = 0; t < count; t++) sums[t] = (floats){0};
            for (int row = 0; row < rows; row++) {
                const float *from = scratch + (row * stride + i) * line;
                for (int column = 0; column < columns; column++) {
                    floats g = load(dy + ((long)row * columns + column) * c + k);
                    const float *at = from + column * stride * LANES;
#pragma GCC unroll 25
                    for (int t = 0; t < count; t++)
                        sums[t] += g * load(at + t / kernel * line + t % kernel * LANES);
                }
            }
            for (int t = 0; t < count; t++) store(part + (i * kernel + t) * c + k, sums[t]);
        }
    }
}

/* A call with the kernel and the stride as constants, where they are the usual ones. */
#define SPECIALISED(call)                                  \
    if (kernel == 3 && stride == 1) call(3, 1);            \
    else if (kernel == 3 && stride == 2) call(3, 2);       \
    else if (kernel == 5 && stride == 1) call(5, 1);       \
    else if (kernel == 5 && stride == 2) call(5, 2);       \
    else call(kernel, stride)

/* Every picture filtered, or with `back` every gradient spread. 0 on success. */
static int pictures(const float *from, const float *weight, float *to, long n, int h, int w, long c,
                    int kernel, int stride, int num_threads, int back) {
    long full = (long)h * w * c;
    long step = (long)((h + stride - 1) / stride) * ((w + stride - 1) / stride) * c;
    int failed = 0;
#pragma omp parallel num_threads(num_threads) reduction(| : failed)
    {
        float *scratch = padded(h, w, kernel);
        failed |= !scratch;
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++) {
            if (!scratch) continue;
#define FILTER(size, by) filter(from + i * full, weight, to + i * step, scratch, h, w, c, size, by)
#define SPREAD(size, by) \
    filter_back(from + i * step, weight, to + i * full, scratch, h, w, c, size, by)
            if (back) {
                SPECIALISED(SPREAD);
            } else {
                SPECIALISED(FILTER);
            }
#undef FILTER
#undef SPREAD
        }
        free(scratch);
    }
    return failed;
}

/* x [n][h][w][c] to y [n][ceil(h / stride)][ceil(w / stride)][c]. 0 on success. */
int depthwise(const float *x, const float *weight, float *y, long n, int h, int w, long c,
              int kernel, int stride, int num_threads) {
    return pictures(x, weight, y, n, h, w, c, kernel, stride, num_threads, 0);
}

/* The gradient dx of dy. With stride 1 the caller filters dy with the kernel turned round, which is
 * faster. 0 on success. */
int depthwise_back(const float *dy, const float *weight, float *dx, long n, int h, int w, long c,
                   int kernel, int stride, int num_threads) {
    return pictures(dy, weight, dx, n, h, w, c, kernel, stride, num_threads, 1);
}

/* The weight gradient [kernel * kernel][c]. 0 on success. */
int depthwise_weights(const float *x, const float *dy, float *gradient, long n, int h, int w, long c,
                      int kernel, int stride, int num_threads) {
    long step = (long)((h + stride - 1) / stride) * ((w + stride - 1) / stride) * c;
    long count = kernel * kernel * c;
    double *totals = calloc(SHARES * count, sizeof(double));
    float *parts = malloc(sizeof(float) * SHARES * count);
    int failed = 0;
#pragma omp parallel num_threads(num_threads) reduction(| : failed)
    {
        float *scratch = totals && parts ? padded(h, w, kernel) : NULL;
        failed |= !scratch;
#pragma omp for schedule(dynamic, 1)
        for (int share = 0; share < SHARES; share++) {
            if (!scratch) continue;
            float *part = parts + share * count;
            for (long i = n * share / SHARES; i < n * (share + 1) / SHARES; i++) {
#define CALL(size, by) \
    filter_weights(x + i * h * w * c, dy + i * step, part, scratch, h, w, c, size, by)
                SPECIALISED(CALL);
#undef CALL
                for (long t = 0; t < count; t++) totals[share * count + t] += part[t];
            }
        }
        free(scratch);
    }
    for (int share = 1; share < SHARES && !failed; share++)
        for (long t = 0; t < count; t++) totals[t] += totals[share * count + t];
    for (long t = 0; t < count && !failed; t++) gradient[t] = (float)totals[t];
    free(totals);
    free(parts);
    return failed;
}

/* sums[n][c] of x [n][places][c], or of its product with g unless that is null. */
void place_sums(const float *x, const float *g, float *sums, long n, long places, long c,
                int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long i = 0; i < n; i++)
        for (long first = 0; first < c; first += LANES) {
            long k = channel(first, c), start = i * places * c + k;
            floats total = {0};
            for (long p = 0; p < places; p += PLACES) {
                long end = p + PLACES < places ? p + PLACES : places;
                floats sum = {0};
                for (long q = p; q < end; q++) {
                    floats v = load(x + start + q * c);
                    if (g) v *= load(g + start + q * c);
                    sum += v;
                }
                total += sum;
            }
            store(sums + i * c + k, total);
        }
}

/* y = x * scale[n][c], plus offset[n][c] unless that is null. */
void place_scale(const float *x, const float *scale, const float *offset, float *y, long n,
                 long places, long c, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long i = 0; i < n; i++)
        for (long first = 0; first < c; first += LANES) {
            long k = channel(first, c), start = i * places * c + k;
            floats s = load(scale + i * c + k);
            floats o = offset ? load(offset + i * c + k) : (floats){0};
            for (long p = 0; p < places; p++)
                store(y + start + p * c, load(x + start + p * c) * s + o);
        }
}
