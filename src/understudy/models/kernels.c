/* Training kernels for small channels-last networks in float32, compiled on the user's machine.
 *
 * - 3x3 convolution, stride 1, padding 1, and its weight gradient, by Winograd's F(4x4, 3x3)
 *   (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.3): a
 *   quarter of the multiplications of the direct form.
 * - Leaky ReLU with dropout in one pass, its mask computed where it is needed.
 *
 * Pictures are [n][h][w][c]; c, h and w are multiples of 16, 4 and 4. GNU C vectors only.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16      /* floats in a vector */
#define TILES 16      /* 4x4 output tiles worked on together: their transforms stay in the cache */
#define POINTS 36     /* 6x6 input points of a tile */
#define ROWS 8        /* rows of a product kept in registers */

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(64), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const float *p) { return *(const floats *)p; }
INLINE void store(float *p, floats v) { *(floats *)p = v; }

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
    if (count < TILES) memset(transformed, 0, sizeof(float) * POINTS * TILES * c);
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
                    store(transformed + ((i * 6 + j) * TILES + t) * (long)c + k, o[j]);
            }
        }
    }
}

/* out[r][:] (+)= sum_k left[k * step_k + r * step_r] * right[k][:], ROWS x (width * LANES). */
INLINE void product(const float *left, long step_k, long step_r, const float *right, float *out,
                    int depth, long columns, int width, int add) {
    floats sum[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < width; v++)
            sum[r][v] = add ? load(out + r * columns + v * LANES) : (floats){0};
    for (int k = 0; k < depth; k++) {
        floats b[2];
        for (int v = 0; v < width; v++) b[v] = load(right + k * columns + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            float a = left[k * step_k + r * step_r];
            for (int v = 0; v < width; v++) sum[r][v] += a * b[v];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < width; v++) store(out + r * columns + v * LANES, sum[r][v]);
}

/* y = conv(x) + bias. weights: [POINTS][in][out], transformed; bias may be null. 0 on success. */
int convolve(const float *x, const float *weights, const float *bias, float *y, int n, int h,
             int w, int in, int out, int num_threads) {
    long num_tiles = (long)n * (h / 4) * (w / 4);
    int failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        float *inputs = aligned_alloc(64, sizeof(float) * POINTS * TILES * in);
        float *products = aligned_alloc(64, sizeof(float) * POINTS * TILES * out);
        if (!inputs || !products) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long first = 0; first < num_tiles; first += TILES) {
            if (failed) continue;
            int count = num_tiles - first < TILES ? (int)(num_tiles - first) : TILES;
            input_tiles(x, inputs, first, count, h, w, in);
            for (int p = 0; p < POINTS; p++)
                for (int r = 0; r < TILES; r += ROWS)
                    for (int k = 0; k < out; k += 2 * LANES) {
                        const float *left = inputs + ((long)p * TILES + r) * in;
                        const float *right = weights + (long)p * in * out + k;
                        float *to = products + ((long)p * TILES + r) * out + k;
                        if (out - k > LANES) product(left, 1, in, right, to, in, out, 2, 0);
                        else product(left, 1, in, right, to, in, out, 1, 0);
                    }
            for (int t = 0; t < count; t++) {
                place at = place_of(first + t, h, w);
                float *image = y + at.image * h * w * out;
                for (int k = 0; k < out; k += LANES) {
                    floats half[4][6], b = bias ? load(bias + k) : (floats){0};
                    for (int j = 0; j < 6; j++) {
                        floats m[6], o[4];
                        for (int i = 0; i < 6; i++)
                            m[i] = load(products + ((i * 6 + j) * TILES + t) * (long)out + k);
                        transform_output(m, o);
                        for (int i = 0; i < 4; i++) half[i][j] = o[i];
                    }
                    for (int i = 0; i < 4; i++) {
                        floats o[4];
                        transform_output(half[i], o);
                        float *row = image + ((long)(at.row + i) * w + at.column) * out + k;
                        for (int j = 0; j < 4; j++) store(row + (long)j * out, o[j] + b);
                    }
                }
            }
        }
        free(inputs);
        free(products);
    }
    return failed;
}

/* sums[thread][POINTS][in][out] and bias_sums[thread][out] += gradients, for the caller to add up
 * and transform back. Both are zero at the start. 0 on success. */
int weight_gradient(const float *x, const float *dy, float *sums, float *bias_sums, int n, int h,
                    int w, int in, int out, int num_threads) {
    long num_tiles = (long)n * (h / 4) * (w / 4);
    int failed = 0;
    long num_blocks = (num_tiles + TILES - 1) / TILES;
#pragma omp parallel num_threads(num_threads)
    {
        float *inputs = aligned_alloc(64, sizeof(float) * POINTS * TILES * in);
        float *gradients = aligned_alloc(64, sizeof(float) * POINTS * TILES * out);
        if (!inputs || !gradients) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static, 1)
        /* One share of the blocks for each sum, whichever thread works on it: the additions, and
         * so every bit of the result, depend on num_threads alone. */
        for (int share = 0; share < num_threads; share++) {
            float *sum = sums + (long)share * POINTS * in * out;
            float *bias_sum = bias_sums + (long)share * out;
            long block = num_blocks * share / num_threads;
            long end = num_blocks * (share + 1) / num_threads;
            for (; block < end && !failed; block++) {
                long first = block * TILES;
                int count = num_tiles - first < TILES ? (int)(num_tiles - first) : TILES;
                input_tiles(x, inputs, first, count, h, w, in);
                if (count < TILES) memset(gradients, 0, sizeof(float) * POINTS * TILES * out);
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
                                store(gradients + ((i * 6 + j) * TILES + t) * (long)out + k, o[j]);
                        }
                    }
                    store(bias_sum + k, total);
                }
                for (int p = 0; p < POINTS; p++)
                    for (int r = 0; r < in; r += ROWS)
                        for (int k = 0; k < out; k += 2 * LANES) {
                            const float *left = inputs + (long)p * TILES * in + r;
                            const float *right = gradients + (long)p * TILES * out + k;
                            float *to = sum + ((long)p * in + r) * out + k;
                            if (out - k > LANES) product(left, in, 1, right, to, TILES, out, 2, 1);
                            else product(left, in, 1, right, to, TILES, out, 1, 1);
                        }
            }
        }
        free(inputs);
        free(gradients);
    }
    return failed;
}

/* keep[e] = all ones where element 64 * block + e is kept: where byte e of the block's 16 words is
 * at least `threshold`. Word i is a hash of i and the key: lowbias32 (Wellons 2018) with the second
 * half of the key in its middle. The same numbers come from `dropout.draw_words`. */
INLINE void keep_masks(uint32_t block, uint32_t key0, uint32_t key1, int threshold, ints keep[4]) {
    words i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    words h = (i + block * LANES) * 0x9E3779B9u + key0;
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= h >> 15;
    h ^= key1;
    h *= 0x846ca68bu;
    h ^= h >> 16;
    /* A byte for each lane, in the highest bits: four lanes share a word. */
    const words up = {24, 16, 8, 0, 24, 16, 8, 0, 24, 16, 8, 0, 24, 16, 8, 0};
    const words least = (words){0} + ((uint32_t)threshold << 24);
#define SPREAD(w) \
    __builtin_shufflevector(h, h, w, w, w, w, w + 1, w + 1, w + 1, w + 1, w + 2, w + 2, w + 2, \
                            w + 2, w + 3, w + 3, w + 3, w + 3)
    keep[0] = SPREAD(0) << up >= least;
    keep[1] = SPREAD(4) << up >= least;
    keep[2] = SPREAD(8) << up >= least;
    keep[3] = SPREAD(12) << up >= least;
}

/* v * (sign > 0 ? high : low), or 0 where not kept. */
INLINE floats masked(floats v, floats sign, ints keep, float high, float low) {
    ints positive = sign > 0.f;
    floats all_high = (floats){0} + high, all_low = (floats){0} + low;
    ints difference = (ints)all_high ^ (ints)all_low;
    floats factor = (floats)((ints)all_low ^ (difference & positive));
    return (floats)((ints)(v * factor) & keep);
}

/* to = from * (sign > 0 ? high : low) * mask, all of n elements in the same order. */
void leaky_dropout(const float *from, const float *sign, float *to, long n, uint32_t key0,
                   uint32_t key1, int threshold, float high, float low, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long block = 0; block < (n + 63) / 64; block++) {
        ints keep[4];
        keep_masks((uint32_t)block, key0, key1, threshold, keep);
        long at = block * 64;
        if (at + 64 <= n) {
            for (int q = 0; q < 4; q++) {
                long e = at + q * LANES;
                store(to + e, masked(load(from + e), load(sign + e), keep[q], high, low));
            }
        } else {
            for (long e = at; e < n; e++) {
                int32_t kept = keep[(e - at) / LANES][(e - at) % LANES];
                to[e] = kept ? from[e] * (sign[e] > 0 ? high : low) : 0.f;
            }
        }
    }
}

/* The same where `from` is [n][c], one row for all pixels of a picture of [pixels][c]:
 * c is a multiple of 16 and pixels * c of 64. */
void leaky_dropout_pooled(const float *from, const float *sign, float *to, long n, long pixels,
                          long c, uint32_t key0, uint32_t key1, int threshold, float high,
                          float low, int num_threads) {
    long num_blocks = pixels * c / 64;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long image = 0; image < n; image++) {
        long channel = 0;
        for (long block = 0; block < num_blocks; block++) {
            ints keep[4];
            keep_masks((uint32_t)(image * num_blocks + block), key0, key1, threshold, keep);
            for (int q = 0; q < 4; q++) {
                long e = (image * num_blocks + block) * 64 + q * LANES;
                floats v = load(from + image * c + channel);
                store(to + e, masked(v, load(sign + e), keep[q], high, low));
                channel = channel + LANES == c ? 0 : channel + LANES;
            }
        }
    }
}
