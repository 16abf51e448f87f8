#include "student.h"

#include <stdint.h>
#include <string.h>

#include "student_network.h"

_Static_assert(sizeof(float) == 4, "float must have 32 bits");

static uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Comparisons of bits, because -ffast-math lets a compiler drop tests for NaN. The patterns of
 * the floats from 0 to 1 are the integers from 0 to that of 1; 0x80000000 is minus zero. */
static int pixel_is_valid(float value) {
    const uint32_t bits = float_bits(value);
    return bits <= UINT32_C(0x3f800000) || bits == UINT32_C(0x80000000);
}

static int is_finite(float value) {
    return (float_bits(value) & UINT32_C(0x7f800000)) != UINT32_C(0x7f800000);
}

/* On some cores a load from an address that is not a multiple of 4 is a fault. */
static int is_aligned(const void *address) {
    return (uintptr_t)address % _Alignof(float) == 0;
}

#if STUDENT_AVERAGES_MIRROR
static void run_mirrored(const float *pixels_chw, float *logits) {
    static float mirrored[STUDENT_NUM_PIXELS];

    for (size_t row = 0; row < STUDENT_NUM_PIXELS; row += STUDENT_WIDTH) {
        for (size_t column = 0; column < STUDENT_WIDTH; ++column) {
            mirrored[row + column] = pixels_chw[row + STUDENT_WIDTH - 1 - column];
        }
    }
    student_network_run(mirrored, logits);
}
#endif

/* The network's logits, finite or not. */
static void run(const float *pixels_chw, float *logits) {
    student_network_run(pixels_chw, logits);
#if STUDENT_AVERAGES_MIRROR
    static float others[STUDENT_NUM_CLASSES];

    run_mirrored(pixels_chw, others);
    for (size_t i = 0; i < STUDENT_NUM_CLASSES; ++i) {
        logits[i] = (logits[i] + others[i]) / 2;
    }
#endif
}

int understudy_classify(const float *pixels_chw, size_t num_pixels, float *logits,
                        size_t num_logits) {
    static float results[STUDENT_NUM_CLASSES];

    if (pixels_chw == NULL || logits == NULL) {
        return UNDERSTUDY_NULL_POINTER;
    }
    if (!is_aligned(pixels_chw) || !is_aligned(logits)) {
        return UNDERSTUDY_NOT_ALIGNED;
    }
    if (num_pixels != STUDENT_NUM_PIXELS) {
        return UNDERSTUDY_WRONG_NUM_PIXELS;
    }
    if (num_logits != STUDENT_NUM_CLASSES) {
        return UNDERSTUDY_WRONG_NUM_LOGITS;
    }
    for (size_t i = 0; i < num_pixels; ++i) {
        if (!pixel_is_valid(pixels_chw[i])) {
            return UNDERSTUDY_BAD_PIXEL;
        }
    }
    run(pixels_chw, results);
    for (size_t i = 0; i < num_logits; ++i) {
        if (!is_finite(results[i])) {
            return UNDERSTUDY_BAD_LOGIT;
        }
    }
    memcpy(logits, results, sizeof results);
    return UNDERSTUDY_OK;
}

size_t understudy_top_class(const float *logits, size_t num_logits) {
    size_t best = 0;
    for (size_t i = 1; logits != NULL && i < num_logits; ++i) {
        if (logits[i] > logits[best]) {
            best = i;
        }
    }
    return best;
}

const char *understudy_error_text(int code) {
    switch (code) {
    case UNDERSTUDY_OK:
        return "no error";
    case UNDERSTUDY_NULL_POINTER:
        return "pixels or logits are a null pointer";
    case UNDERSTUDY_NOT_ALIGNED:
        return "pixels or logits are not at an address that is a multiple of 4";
    case UNDERSTUDY_WRONG_NUM_PIXELS:
        return "num_pixels is not channels * height * width";
    case UNDERSTUDY_WRONG_NUM_LOGITS:
        return "num_logits is not the number of classes";
    case UNDERSTUDY_BAD_PIXEL:
        return "a pixel is NaN or outside [0, 1]";
    case UNDERSTUDY_BAD_LOGIT:
        return "the network returned NaN or infinity";
    default:
        return "unknown error code";
    }
}

const struct student_info student_info = {
    STUDENT_CHANNELS,   STUDENT_HEIGHT,    STUDENT_WIDTH, STUDENT_NUM_PIXELS, STUDENT_NUM_CLASSES,
    STUDENT_PRECISION,  STUDENT_RECIPE,    STUDENT_ARENA_BYTES,
    STUDENT_WEIGHT_BYTES,
    {STUDENT_CLASS_NAMES},
};
