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

/* Which taps of the kernel lie inside a side for the output at this place. */
typedef struct { int first, end; } taps;

INLINE taps inside(int output, int stride, int kernel, int side) {
    int start = output * stride - kernel / 2;
    taps t = {start < 0 ? -start : 0, start + kernel > side ? side - start : kernel};
    return t;
}

/* One picture x [h][w][c] to y [ceil(h / stride)][ceil(w / stride)][c]. */
INLINE void filter(const float *x, const float *weight, float *y, int h, int w, long c, int kernel,
                   int stride) {
    int rows = (h + stride - 1) / stride, columns = (w + stride - 1) / stride, half = kernel / 2;
    for (long first = 0; first < c; first += LANES) {
        long k = channel(first, c);
        floats taps_of[kernel * kernel];
        for (int t = 0; t < kernel * kernel; t++) taps_of[t] = load(weight + t * c + k);
        for (int row = 0; row < rows; row++) {
            taps down = inside(row, stride, kernel, h);
            const float *line = x + ((long)(row * stride - half) * w - half) * c + k;
            int whole = down.end - down.first == kernel;
            for (int column = 0; column < columns; column++) {
                taps across = inside(column, stride, kernel, w);
                const float *from = line + (long)column * stride * c;
                floats sum = {0};
                if (whole && across.end - across.first == kernel) {
#pragma GCC unroll 25
                    for (int t = 0; t < kernel * kernel; t++)
                        sum += taps_of[t] * load(from + ((t / kernel) * (long)w + t % kernel) * c);
                } else {
                    for (int i = down.first; i < down.end; i++)
                        for (int j = across.first; j < across.end; j++)
                            sum += taps_of[i * kernel + j] * load(from + (i * (long)w + j) * c);
                }
                store(y + ((long)row * columns + column) * c + k, sum);
            }
        }
    }
}

/* One picture's gradient dx [h][w][c] of dy, for any stride. */
static void filter_back(const float *dy, const float *weight, float *dx, int h, int w, long c,
                        int kernel, int stride) {
    int rows = (h + stride - 1) / stride, columns = (w + stride - 1) / stride, half = kernel / 2;
    for (long first = 0; first < c; first += LANES) {
        long k = channel(first, c);
        for (int row = 0; row < h; row++)
            for (int column = 0; column < w; column++) {
                floats sum = {0};
                /* Tap i of output o read input o * stride - half + i. */
                for (int i = (row + half) % stride; i < kernel; i += stride) {
                    int from = (row + half - i) / stride;
                    if (row + half < i || from >= rows) continue;
                    for (int j = (column + half) % stride; j < kernel; j += stride) {
                        int at = (column + half - j) / stride;
                        if (column + half < j || at >= columns) continue;
                        sum += load(weight + (i * kernel + j) * c + k) *
                               load(dy + ((long)from * columns + at) * c + k);
                    }
                }
                store(dx + ((long)row * w + column) * c + k, sum);
            }
    }
}

/* One picture's part [kernel * kernel][c] of the weight gradient. */
INLINE void filter_weights(const float *x, const float *dy, float *part, int h, int w, long c,
                           int kernel, int stride) {
    int rows = (h + stride - 1) / stride, columns = (w + stride - 1) / stride, half = kernel / 2;
    for (long first = 0; first < c; first += LANES) {
        long k = channel(first, c);
        floats sums[kernel * kernel], edges[kernel * kernel];
        for (int t = 0; t < kernel * kernel; t++) sums[t] = edges[t] = (floats){0};
        for (int row = 0; row < rows; row++) {
            taps down = inside(row, stride, kernel, h);
            const float *line = x + ((long)(row * stride - half) * w - half) * c + k;
            int whole = down.end - down.first == kernel;
            for (int column = 0; column < columns; column++) {
                taps across = inside(column, stride, kernel, w);
                const float *from = line + (long)column * stride * c;
                floats g = load(dy + ((long)row * columns + column) * c + k);
                if (whole && across.end - across.first == kernel) {
#pragma GCC unroll 25
                    for (int t = 0; t < kernel * kernel; t++)
                        sums[t] += g * load(from + ((t / kernel) * (long)w + t % kernel) * c);
                } else {
                    for (int i = down.first; i < down.end; i++)
                        for (int j = across.first; j < across.end; j++)
                            edges[i * kernel + j] += g * load(from + (i * (long)w + j) * c);
                }
            }
        }
        for (int t = 0; t < kernel * kernel; t++) store(part + t * c + k, sums[t] + edges[t]);
    }
}

/* A call with the kernel and the stride as constants, where they are the usual ones. */
#define SPECIALISED(call)                                  \
    if (kernel == 3 && stride == 1) call(3, 1);            \
    else if (kernel == 3 && stride == 2) call(3, 2);       \
    else if (kernel == 5 && stride == 1) call(5, 1);       \
    else if (kernel == 5 && stride == 2) call(5, 2);       \
    else call(kernel, stride)

/* x [n][h][w][c] to y [n][ceil(h / stride)][ceil(w / stride)][c]. */
void depthwise(const float *x, const float *weight, float *y, long n, int h, int w, long c,
               int kernel, int stride, int num_threads) {
    long step = (long)((h + stride - 1) / stride) * ((w + stride - 1) / stride) * c;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long i = 0; i < n; i++) {
#define CALL(size, by) filter(x + i * h * w * c, weight, y + i * step, h, w, c, size, by)
        SPECIALISED(CALL);
#undef CALL
    }
}

/* The gradient dx of dy. With stride 1 the caller filters dy with the kernel turned round. */
void depthwise_back(const float *dy, const float *weight, float *dx, long n, int h, int w, long c,
                    int kernel, int stride, int num_threads) {
    long step = (long)((h + stride - 1) / stride) * ((w + stride - 1) / stride) * c;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long i = 0; i < n; i++)
        filter_back(dy + i * step, weight, dx + i * h * w * c, h, w, c, kernel, stride);
}

/* The weight gradient [kernel * kernel][c]. 0 on success. */
int depthwise_weights(const float *x, const float *dy, float *gradient, long n, int h, int w, long c,
                      int kernel, int stride, int num_threads) {
    long step = (long)((h + stride - 1) / stride) * ((w + stride - 1) / stride) * c;
    long count = kernel * kernel * c;
    double *totals = calloc(SHARES * count, sizeof(double));
    float *parts = malloc(sizeof(float) * SHARES * count);
    if (!totals || !parts) {
        free(totals);
        free(parts);
        return 1;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int share = 0; share < SHARES; share++) {
        float *part = parts + share * count;
        for (long i = n * share / SHARES; i < n * (share + 1) / SHARES; i++) {
#define CALL(size, by) \
    filter_weights(x + i * h * w * c, dy + i * step, part, h, w, c, size, by)
            SPECIALISED(CALL);
#undef CALL
            for (long t = 0; t < count; t++) totals[share * count + t] += part[t];
        }
    }
    for (int share = 1; share < SHARES; share++)
        for (long t = 0; t < count; t++) totals[t] += totals[share * count + t];
    for (long t = 0; t < count; t++) gradient[t] = (float)totals[t];
    free(totals);
    free(parts);
    return 0;
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
