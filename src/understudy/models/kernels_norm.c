/* Batch norm, with an activation or with a block's input added after it, for channels-last pictures in
 * float32: rows of c channels, c at least 16.
 *
 * Sums are taken over a fixed number of shares of the rows, whichever thread works on them, so that
 * the bits do not depend on the threads: within a block of rows in float, over blocks in double.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define BLOCK 16  /* rows of a block: few enough for the first-level cache */
#define SHARES 16

enum { IDENTITY, RELU, HARD_SWISH };

INLINE floats chosen(ints mask, floats yes, floats no) {
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}

INLINE floats activated(floats v, int activation) {
    if (activation == RELU) return (floats)((ints)v & ~(v < 0.f));
    if (activation == IDENTITY) return v;
    floats gate = v + 3.f, six = (floats){0} + 6.f;
    gate = (floats)((ints)gate & (gate > 0.f));
    return v * chosen(gate > 6.f, six, gate) * (1.f / 6.f);
}

/* The gradient past the activation, of which (x - mean) * slope + bias is the input. */
INLINE floats past(floats g, floats centred, floats slope, floats bias, int activation) {
    if (activation == IDENTITY) return g;
    floats v = centred * slope + bias;
    if (activation == RELU) return (floats)((ints)g & (v > 0.f));
    floats inner = g * (v * (1.f / 3.f) + 0.5f);
    return chosen(v > 3.f, g, (floats)((ints)inner & ~(v < -3.f)));
}

/* The sums over rows of two terms, shares one after the other; totals: [2][c]. With g null the
 * terms are d and d * d of d = x - middle; else the gradient and its product with d. 0 on success. */
static int sums(const float *x, const float *g, const float *middle, const float *slope,
                const float *bias, double *totals, long rows, long c, int activation,
                int num_threads) {
    double *shares = calloc(SHARES * 2 * c, sizeof(double));
    float *parts = malloc(sizeof(float) * SHARES * 2 * c);
    if (!shares || !parts) {
        free(shares);
        free(parts);
        return 1;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int share = 0; share < SHARES; share++) {
        double *total = shares + share * 2 * c;
        float *part = parts + share * 2 * c;
        long end = rows * (share + 1) / SHARES;
        for (long row = rows * share / SHARES; row < end; row += BLOCK) {
            long stop = row + BLOCK < end ? row + BLOCK : end;
            for (long first = 0; first < c; first += LANES) {
                long k = channel(first, c);
                floats one = {0}, two = {0}, m = load(middle + k);
                floats s = load(slope + k), b = load(bias + k);
                for (long r = row; r < stop; r++) {
                    floats d = load(x + r * c + k) - m;
                    floats v = g ? past(load(g + r * c + k), d, s, b, activation) : d;
                    one += v;
                    two += v * d;
                }
                store(part + k, one);
                store(part + c + k, two);
            }
            for (long k = 0; k < 2 * c; k++) total[k] += part[k];
        }
    }
    memset(totals, 0, sizeof(double) * 2 * c);
    for (int share = 0; share < SHARES; share++)
        for (long k = 0; k < 2 * c; k++) totals[k] += shares[share * 2 * c + k];
    free(shares);
    free(parts);
    return 0;
}

/* The norm of x * factor[c], or of x where factor is null: y = (x - mean) * slope + bias, slope =
 * weight * factor / sqrt(variance * factor^2 + eps); then its activation, or added (the same shape)
 * to it unless that is null. saved: [3][c], the mean of x, the slope and slope / weight. The running
 * averages, of x * factor, move by momentum. */
int norm_forward(const float *x, const float *factor, const float *weight, const float *bias,
                 const float *added, float *running_mean, float *running_variance, float *y,
                 float *saved, long rows, long c, double eps, double momentum, int activation,
                 int num_threads) {
    float *mean = saved, *slope = saved + c, *inverse = saved + 2 * c;
    double *totals = malloc(sizeof(double) * 2 * c);
    /* About the first row: the squares of what is far from zero would cancel. */
    if (!totals || sums(x, NULL, x, weight, bias, totals, rows, c, 0, num_threads)) {
        free(totals);
        return 1;
    }
    for (long k = 0; k < c; k++) {
        double offset = totals[k] / rows;
        double by = factor ? factor[k] : 1;
        double variance = (totals[c + k] / rows - offset * offset) * by * by;
        variance = variance < 0 ? 0 : variance;
        mean[k] = (float)(x[k] + offset);
        inverse[k] = (float)(by / sqrt(variance + eps));
        slope[k] = weight[k] * inverse[k];
        running_mean[k] =
            (float)(running_mean[k] * (1 - momentum) + momentum * (x[k] + offset) * by);
        running_variance[k] = (float)(running_variance[k] * (1 - momentum) +
                                      momentum * variance * rows / (rows - 1));
    }
    free(totals);
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long r = 0; r < rows; r++)
        for (long first = 0; first < c; first += LANES) {
            long k = channel(first, c);
            floats v = (load(x + r * c + k) - load(mean + k)) * load(slope + k) + load(bias + k);
            if (added) v += load(added + r * c + k);
            store(y + r * c + k, activated(v, activation));
        }
    return 0;
}

/* dx, dweight[c] and dbias[c] of dy and what norm_forward saved. 0 on success. */
int norm_backward(const float *x, const float *dy, const float *bias, const float *saved,
                  float *dx, float *dweight, float *dbias, long rows, long c, int activation,
                  int num_threads) {
    const float *mean = saved, *slope = saved + c, *inverse = saved + 2 * c;
    double *totals = malloc(sizeof(double) * 2 * c);
    float *factors = malloc(sizeof(float) * 2 * c);
    if (!totals || !factors ||
        sums(x, dy, mean, slope, bias, totals, rows, c, activation, num_threads)) {
        free(totals);
        free(factors);
        return 1;
    }
    for (long k = 0; k < c; k++) {
        dbias[k] = (float)totals[k];
        dweight[k] = (float)(totals[c + k] * inverse[k]);
        factors[k] = (float)(totals[k] / rows);
        factors[c + k] = (float)(totals[c + k] * inverse[k] * inverse[k] / rows);
    }
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long r = 0; r < rows; r++)
        for (long first = 0; first < c; first += LANES) {
            long k = channel(first, c);
            floats d = load(x + r * c + k) - load(mean + k), s = load(slope + k);
            floats g = past(load(dy + r * c + k), d, s, load(bias + k), activation);
            store(dx + r * c + k, s * (g - load(factors + k) - d * load(factors + c + k)));
        }
    free(totals);
    free(factors);
    return 0;
}
