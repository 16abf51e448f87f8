/* Kernels for small channels-last networks in float32, compiled on the user's machine.
 * Pictures are [n][h][w][c].
 *
 * - 3x3 convolution, stride 1, padding 1, and its weight gradient, by Winograd's F(4x4, 3x3)
 *   (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.3): a
 *   quarter of the multiplications of the direct form. The same directly for 1 or 3 channels.
 * - Leaky ReLU with dropout in one pass, its mask computed where it is needed.
 *
 * Sides are multiples of 4 (8 for the direct form), channels of 16.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define TILES 16      /* 4x4 output tiles worked on together: their transforms stay in the cache */
#define POINTS 36     /* 6x6 input points of a tile */
/* The sums that a product keeps in registers: ROWS x 2 vectors, for the nine rows of a picture's three
 * channels 9 x FEW_WIDTH. AVX-512 has 32 registers, AVX2 16. */
#if LANES == 16
#define ROWS 8
#define FEW_WIDTH 2
#else
#define ROWS 4
#define FEW_WIDTH 1
#endif
#define MAX_ROWS TILES
/* GCC would load it anew for each of the products that it is in. */
#if defined(__AVX512F__) || (defined(__AVX__) && LANES == 8)
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define IN_REGISTER(v)
#endif
/* Floats from one point's tiles to the next: a power of two would put all points into the same few
 * sets of the cache. */
#define STEP(c) (TILES * (long)(c) + LANES)
#define SHARES 8      /* parts of a batch whose weight gradients are added up apart */

typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
/* Vectors of the 64 elements that share a block of a mask. */
#define PARTS (64 / LANES)

/* A layer's leaky ReLU and dropout: which elements are kept, and the factors of those that are. */
typedef struct { uint32_t key0, key1; int32_t threshold; float high, low; } mask;

/* keep[e] = all ones where element 64 * block + e is kept: where byte e of the block's 16 words is
 * at least the threshold. Word i is a hash of i and the key: lowbias32 (Wellons 2018) with the second
 * half of the key after its first step. The same numbers come from `dropout.draw_words`. */
INLINE void keep_masks(uint32_t block, const mask *m, ints keep[PARTS]) {
    if (!m->threshold) {
        for (int v = 0; v < PARTS; v++) keep[v] = (ints){0} - 1;
        return;
    }
    /* A byte for each lane, in the highest bits: four lanes share a word. */
    const words least = (words){0} + ((uint32_t)m->threshold << 24);
#define FOUR(w) w, w, w, w
#if LANES == 16
    const words count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const words up = {24, 16, 8, 0, 24, 16, 8, 0, 24, 16, 8, 0, 24, 16, 8, 0};
#define SPREAD(q) \
    __builtin_shufflevector(h, h, FOUR(4 * q), FOUR(4 * q + 1), FOUR(4 * q + 2), FOUR(4 * q + 3))
#else
    const words count = {0, 1, 2, 3, 4, 5, 6, 7};
    const words up = {24, 16, 8, 0, 24, 16, 8, 0};
#define SPREAD(q) __builtin_shufflevector(h, h, FOUR(2 * q), FOUR(2 * q + 1))
#endif
    for (int v = 0; v < PARTS; v += 4) {
        words h = (count + block * 16 + v / 4 * LANES) * 0x9E3779B9u + m->key0;
        h ^= h >> 16;
        h ^= m->key1;
        h *= 0x7feb352du;
        h ^= h >> 15;
        h *= 0x846ca68bu;
        h ^= h >> 16;
        keep[v] = SPREAD(0) << up >= least;
        keep[v + 1] = SPREAD(1) << up >= least;
        keep[v + 2] = SPREAD(2) << up >= least;
        keep[v + 3] = SPREAD(3) << up >= least;
    }
}

/* v * (sign > 0 ? m->high : m->low), or 0 where not kept. */
INLINE floats masked(floats v, floats sign, ints keep, const mask *m) {
    ints positive = sign > 0.f;
    floats all_high = (floats){0} + m->high, all_low = (floats){0} + m->low;
    ints difference = (ints)all_high ^ (ints)all_low;
    floats factor = (floats)((ints)all_low ^ (difference & positive));
    return (floats)((ints)(v * factor) & keep);
}

/* The mask on a line that begins at this element of the layer; both are multiples of 64. */
INLINE void mask_line(float *line, long element, int length, const mask *m) {
    for (int at = 0; at < length; at += 64) {
        ints keep[PARTS];
        keep_masks((uint32_t)((element + at) / 64), m, keep);
        for (int q = 0; q < PARTS; q++) {
            floats v = load(line + at + q * LANES);
            store(line + at + q * LANES, masked(v, v, keep[q], m));
        }
    }
}

/* max(v, 0), and NaN where v is. */
INLINE floats rectified(floats v) { return (floats)((ints)v & ~(v < 0.f)); }

/* B^T d: six input points. */
INLINE void transform_input(const floats d[6], floats o[6]) {
    floats a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1];
    floats c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
    o[0] = 4.f * d[0] - 5.f * d[2] + d[4];
    o[1] = a + b;
    o[2] = a - b;
    o[3] = c + e;
    o[4] = c - e;
    o[5] = 4.f * d[1] - 5.f * d[3] + d[5];
}

/* A^T m: six products to four outputs. */
INLINE void transform_output(const floats m[6], floats o[4]) {
    floats p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
    o[0] = m[0] + p + r;
    o[1] = q + 2.f * s;
    o[2] = p + 4.f * r;
    o[3] = q + 8.f * s + m[5];
}

/* A y: the adjoint, four output gradients to six. */
INLINE void transform_gradient(const floats y[4], floats o[6]) {
    floats p = y[0] + y[2], q = y[1] + y[3], r = y[0] + 4.f * y[2], s = 2.f * y[1] + 8.f * y[3];
    o[0] = y[0];
    o[1] = p + q;
    o[2] = p - q;
    o[3] = r + s;
    o[4] = r - s;
    o[5] = y[3];
}

/* Where a tile of the batch begins: its picture, and the row and column of its first output. */
typedef struct { long image; int row, column; } place;

INLINE place place_of(long tile, int h, int w) {
    int across = w / 4, in_image = h / 4 * across, index = (int)(tile % in_image);
    return (place){tile / in_image, index / across * 4, index % across * 4};
}

/* transformed[POINTS][TILES][c] of `count` tiles from `first`; the rest is zero. */
static void input_tiles(const float *x, float *transformed, long first, int count, int h, int w,
                        int c) {
    if (count < TILES) memset(transformed, 0, sizeof(float) * POINTS * STEP(c));
    for (int t = 0; t < count; t++) {
        place at = place_of(first + t, h, w);
        const float *image = x + at.image * h * w * c;
        for (int k = 0; k < c; k += LANES) {
            floats half[6][6];
            for (int j = 0; j < 6; j++) {
                floats d[6], o[6];
                int column = at.column - 1 + j;
                for (int i = 0; i < 6; i++) {
                    int row = at.row - 1 + i;
                    int inside = row >= 0 && row < h && column >= 0 && column < w;
                    d[i] = inside ? load(image + ((long)row * w + column) * c + k) : (floats){0};
                }
                transform_input(d, o);
                for (int i = 0; i < 6; i++) half[i][j] = o[i];
            }
            for (int i = 0; i < 6; i++) {
                floats o[6];
                transform_input(half[i], o);
                for (int j = 0; j < 6; j++)
                    store(transformed + (i * 6 + j) * STEP(c) + t * (long)c + k, o[j]);
            }
        }
    }
}

/* out[r][:] (+)= sum_k left[k * step_k + r * step_r] * right[k][:], rows x (width * LANES).
 * rows, width and add are constants where it is called. */
INLINE void product(const float *left, long step_k, long step_r, const float *right, float *out,
                    int depth, long columns, int rows, int width, int add) {
    floats sum[MAX_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < width; v++)
            sum[r][v] = add ? load(out + r * columns + v * LANES) : (floats){0};
    for (int k = 0; k < depth; k++) {
        floats b[2];
        for (int v = 0; v < width; v++) {
            b[v] = load(right + k * columns + v * LANES);
            IN_REGISTER(b[v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            float a = left[k * step_k + r * step_r];
            for (int v = 0; v < width; v++) sum[r][v] += a * b[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < width; v++) store(out + r * columns + v * LANES, sum[r][v]);
}

/* y = conv(x) + bias + added, rectified where asked, then the mask. weights: [POINTS][in][out],
 * transformed; bias, added and mask may be null, and y may be added. 0 on success. */
INLINE int convolve_any(const float *x, const float *weights, const float *bias,
                        const float *added, float *y, int n, int h, int w, int in, int out,
                        int rectify, int num_threads, const mask *m) {
    long num_tiles = (long)n * (h / 4) * (w / 4);
    int failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        float *inputs = aligned_alloc(64, sizeof(float) * POINTS * STEP(in));
        float *products = aligned_alloc(64, sizeof(float) * POINTS * STEP(out));
        if (!inputs || !products) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 4)
        for (long first = 0; first < num_tiles; first += TILES) {
            if (failed) continue;
            int count = num_tiles - first < TILES ? (int)(num_tiles - first) : TILES;
            input_tiles(x, inputs, first, count, h, w, in);
            for (int p = 0; p < POINTS; p++)
                for (int k = 0; k < out; k += 2 * LANES) {
                    const float *left = inputs + p * STEP(in);
                    const float *right = weights + (long)p * in * out + k;
                    float *to = products + p * STEP(out) + k;
                    if (out - k <= LANES) {
                        product(left, 1, in, right, to, in, out, TILES, 1, 0);
                        continue;
                    }
                    for (int r = 0; r < TILES; r += ROWS)
                        product(left + (long)r * in, 1, in, right, to + (long)r * out, in, out,
                                ROWS, 2, 0);
                }
            for (int t = 0; t < count; t++) {
                place at = place_of(first + t, h, w);
                float *image = y + at.image * h * w * out;
                for (int k = 0; k < out; k += LANES) {
                    floats half[4][6], b = bias ? load(bias + k) : (floats){0};
                    for (int j = 0; j < 6; j++) {
                        floats m[6], o[4];
                        for (int i = 0; i < 6; i++)
                            m[i] = load(products + (i * 6 + j) * STEP(out) + t * (long)out + k);
                        transform_output(m, o);
                        for (int i = 0; i < 4; i++) half[i][j] = o[i];
                    }
                    for (int i = 0; i < 4; i++) {
                        floats o[4];
                        transform_output(half[i], o);
                        float *row = image + ((long)(at.row + i) * w + at.column) * out + k;
                        for (int j = 0; j < 4; j++) {
                            floats v = o[j] + b;
                            if (added) v += load(added + (row - y) + (long)j * out);
                            if (rectify) v = rectified(v);
                            store(row + (long)j * out, v);
                        }
                    }
                }
                for (int i = 0; m && i < 4; i++) {
                    float *line = image + ((long)(at.row + i) * w + at.column) * out;
                    mask_line(line, line - y, 4 * out, m);
                }
            }
        }
        free(inputs);
        free(products);
    }
    return failed;
}

int convolve(const float *x, const float *weights, const float *bias, float *y, int n, int h,
             int w, int in, int out, int num_threads, const mask *m) {
    return convolve_any(x, weights, bias, NULL, y, n, h, w, in, out, 0, num_threads, m);
}

/* For inference: y = conv(x) + bias + added, max(y, 0) where rectify. */
int convolve_added(const float *x, const float *weights, const float *bias, const float *added,
                   float *y, int n, int h, int w, int in, int out, int rectify, int num_threads) {
    return convolve_any(x, weights, bias, added, y, n, h, w, in, out, rectify, num_threads, NULL);
}

/* sums[SHARES][POINTS][in][out] and bias_sums[SHARES][out] += gradients, for the caller to add up
 * and transform back. Both are zero at the start. Each share of the batch has a sum of its own,
 * whichever thread works on it, so that the bits do not depend on the threads. 0 on success. */
int weight_gradient(const float *x, const float *dy, float *sums, float *bias_sums, int n, int h,
                    int w, int in, int out, int num_threads) {
    long num_tiles = (long)n * (h / 4) * (w / 4);
    int failed = 0;
    long num_blocks = (num_tiles + TILES - 1) / TILES;
#pragma omp parallel num_threads(num_threads)
    {
        float *inputs = aligned_alloc(64, sizeof(float) * POINTS * STEP(in));
        float *gradients = aligned_alloc(64, sizeof(float) * POINTS * STEP(out));
        if (!inputs || !gradients) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int share = 0; share < SHARES; share++) {
            float *sum = sums + (long)share * POINTS * in * out;
            float *bias_sum = bias_sums + (long)share * out;
            long block = num_blocks * share / SHARES;
            long end = num_blocks * (share + 1) / SHARES;
            for (; block < end && !failed; block++) {
                long first = block * TILES;
                int count = num_tiles - first < TILES ? (int)(num_tiles - first) : TILES;
                input_tiles(x, inputs, first, count, h, w, in);
                if (count < TILES) memset(gradients, 0, sizeof(float) * POINTS * STEP(out));
                for (int k = 0; k < out; k += LANES) {
                    floats total = load(bias_sum + k);
                    for (int t = 0; t < count; t++) {
                        place at = place_of(first + t, h, w);
                        const float *image = dy + at.image * h * w * out;
                        floats half[6][4];
                        for (int j = 0; j < 4; j++) {
                            floats d[4], o[6];
                            for (int i = 0; i < 4; i++) {
                                long pixel = (long)(at.row + i) * w + at.column + j;
                                d[i] = load(image + pixel * out + k);
                                total += d[i];
                            }
                            transform_gradient(d, o);
                            for (int i = 0; i < 6; i++) half[i][j] = o[i];
                        }
                        for (int i = 0; i < 6; i++) {
                            floats o[6];
                            transform_gradient(half[i], o);
                            for (int j = 0; j < 6; j++)
                                store(gradients + (i * 6 + j) * STEP(out) + t * (long)out + k, o[j]);
                        }
                    }
                    store(bias_sum + k, total);
                }
                for (int p = 0; p < POINTS; p++)
                    for (int r = 0; r < in; r += ROWS)
                        for (int k = 0; k < out; k += 2 * LANES) {
                            const float *left = inputs + p * STEP(in) + r;
                            const float *right = gradients + p * STEP(out) + k;
                            float *to = sum + ((long)p * in + r) * out + k;
                            if (out - k > LANES) product(left, in, 1, right, to, TILES, out, ROWS, 2, 1);
                            else product(left, in, 1, right, to, TILES, out, ROWS, 1, 1);
                        }
            }
        }
        free(inputs);
        free(gradients);
    }
    return failed;
}

/* padded[w + 2][c] = one row of a picture between two zero pixels; all zero outside of it. */
INLINE void padded_row(const float *image, float *padded, int row, int h, int w, int c) {
    memset(padded, 0, sizeof(float) * (w + 2) * c);
    if (row >= 0 && row < h)
        memcpy(padded + c, image + (long)row * w * c, sizeof(float) * w * c);
}

/* The same for few input channels. weights: [3][3 * in][out], rows of the kernel; w is a multiple
 * of ROWS, out of LANES. 0 on success. */
int convolve_few(const float *x, const float *weights, const float *bias, float *y, int n, int h,
                 int w, int in, int out, int num_threads, const mask *m) {
    int failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        float *padded = malloc(sizeof(float) * 3 * (w + 2) * in);
        if (!padded) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 32)
        for (long line = 0; line < (long)n * h; line++) {
            if (failed) continue;
            int row = (int)(line % h);
            const float *image = x + line / h * h * w * in;
            for (int i = 0; i < 3; i++)
                padded_row(image, padded + i * (w + 2) * in, row - 1 + i, h, w, in);
            for (int column = 0; column < w; column += ROWS) {
                float *to = y + (line * w + column) * out;
                for (int r = 0; r < ROWS; r++)
                    for (int k = 0; k < out; k += LANES)
                        store(to + r * out + k, bias ? load(bias + k) : (floats){0});
                for (int i = 0; i < 3; i++)
                    for (int k = 0; k < out; k += 2 * LANES) {
                        const float *left = padded + (i * (w + 2) + column) * in;
                        const float *right = weights + (long)i * 3 * in * out + k;
                        if (out - k > LANES)
                            product(left, 1, in, right, to + k, 3 * in, out, ROWS, 2, 1);
                        else
                            product(left, 1, in, right, to + k, 3 * in, out, ROWS, 1, 1);
                    }
                if (m) mask_line(to, to - y, ROWS * out, m);
            }
        }
        free(padded);
    }
    return failed;
}

/* sums[SHARES][3][3 * in][out] and bias_sums[SHARES][out] += gradients; in is 1 or 3. */
int weight_gradient_few(const float *x, const float *dy, float *sums, float *bias_sums, int n,
                        int h, int w, int in, int out, int num_threads) {
    int failed = 0;
    long num_lines = (long)n * h;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int share = 0; share < SHARES; share++) {
        float *padded = malloc(sizeof(float) * (w + 2) * in);
        if (!padded) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        float *bias_sum = bias_sums + (long)share * out;
        long end = num_lines * (share + 1) / SHARES;
        for (long line = num_lines * share / SHARES; line < end; line++) {
            const float *image = x + line / h * h * w * in, *gradient = dy + line * w * out;
            for (int k = 0; k < out; k += LANES) {
                floats total = load(bias_sum + k);
                for (int column = 0; column < w; column++) total += load(gradient + column * out + k);
                store(bias_sum + k, total);
            }
            for (int i = 0; i < 3; i++) {
                padded_row(image, padded, (int)(line % h) - 1 + i, h, w, in);
                for (int k = 0; k < out; k += FEW_WIDTH * LANES) {
                    float *to = sums + ((long)share * 3 + i) * 3 * in * out + k;
                    const float *right = gradient + k;
                    int two = FEW_WIDTH == 2 && out - k > LANES;
                    if (in == 3 && two) product(padded, in, 1, right, to, w, out, 9, 2, 1);
                    else if (in == 3) product(padded, in, 1, right, to, w, out, 9, 1, 1);
                    else if (two) product(padded, in, 1, right, to, w, out, 3, 2, 1);
                    else product(padded, in, 1, right, to, w, out, 3, 1, 1);
                }
            }
        }
        free(padded);
    }
    return failed;
}

/* to = from * (sign > 0 ? m->high : m->low) where kept, all of n elements in the same order. */
void leaky_dropout(const float *from, const float *sign, float *to, long n, int num_threads,
                   const mask *m) {
#pragma omp parallel for schedule(dynamic, 512) num_threads(num_threads)
    for (long block = 0; block < (n + 63) / 64; block++) {
        ints keep[PARTS];
        keep_masks((uint32_t)block, m, keep);
        long at = block * 64;
        if (at + 64 <= n) {
            for (int q = 0; q < PARTS; q++) {
                long e = at + q * LANES;
                store(to + e, masked(load(from + e), load(sign + e), keep[q], m));
            }
        } else {
            for (long e = at; e < n; e++) {
                int32_t kept = keep[(e - at) / LANES][(e - at) % LANES];
                to[e] = kept ? from[e] * (sign[e] > 0 ? m->high : m->low) : 0.f;
            }
        }
    }
}

/* The same where `from` is [n][c], one row for all pixels of a picture of [pixels][c]:
 * c is a multiple of 16 and pixels * c of 64. */
void leaky_dropout_pooled(const float *from, const float *sign, float *to, long n, long pixels,
                          long c, int num_threads, const mask *m) {
    long num_blocks = pixels * c / 64;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (long image = 0; image < n; image++) {
        long channel = 0;
        for (long block = 0; block < num_blocks; block++) {
            ints keep[PARTS];
            keep_masks((uint32_t)(image * num_blocks + block), m, keep);
            for (int q = 0; q < PARTS; q++) {
                long e = (image * num_blocks + block) * 64 + q * LANES;
                floats v = load(from + image * c + channel);
                store(to + e, masked(v, load(sign + e), keep[q], m));
                channel = channel + LANES == c ? 0 : channel + LANES;
            }
        }
    }
}
