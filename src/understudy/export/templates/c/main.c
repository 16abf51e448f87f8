/* Self-test: runs the images of test_vector.h and compares with what ONNX Runtime answered.
 * Prints PASS or FAIL and returns 0 or 1. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "student.h"
#include "test_vector.h"

#ifdef STUDENT_BARE_METAL
#include "board.h"
#endif

static float pixels[STUDENT_NUM_PIXELS];

/* Floats in order of size as integers in order of size, so that a difference counts the floats
 * that lie between two. */
static int64_t ordered(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & UINT32_C(0x80000000)) != 0 ? -(int64_t)(bits & UINT32_C(0x7fffffff))
                                              : (int64_t)bits;
}

static int check_image(size_t image) {
    float logits[STUDENT_NUM_CLASSES];
    float max_difference = 0.0f;
    int64_t max_ulp = 0;

    for (size_t i = 0; i < STUDENT_NUM_PIXELS; ++i) {
        pixels[i] = (float)test_images[image][i] / 255.0f;
    }
    const int code = understudy_classify(pixels, STUDENT_NUM_PIXELS, logits, STUDENT_NUM_CLASSES);
    if (code != UNDERSTUDY_OK) {
        printf("image %u: %s\n", (unsigned)image, understudy_error_text(code));
        return 0;
    }
    for (size_t k = 0; k < STUDENT_NUM_CLASSES; ++k) {
        const float difference = fabsf(logits[k] - test_logits[image][k]);
        int64_t ulp = ordered(logits[k]) - ordered(test_logits[image][k]);
        ulp = ulp < 0 ? -ulp : ulp;
        max_ulp = ulp > max_ulp ? ulp : max_ulp;
        max_difference = difference > max_difference ? difference : max_difference;
    }
    const size_t found = understudy_top_class(logits, STUDENT_NUM_CLASSES);
    const size_t expected = understudy_top_class(test_logits[image], STUDENT_NUM_CLASSES);
    printf("image %u: largest difference %.3g (%ld ulp), class %u, expected %u\n", (unsigned)image,
           (double)max_difference, (long)max_ulp, (unsigned)found, (unsigned)expected);
    return max_difference <= TEST_TOLERANCE && found == expected;
}

/* Wrong arguments must come back as error codes. */
static int check_errors(void) {
    float logits[STUDENT_NUM_CLASSES];
    int good = 1;

    memset(pixels, 0, sizeof pixels);
    good &= understudy_classify(NULL, STUDENT_NUM_PIXELS, logits, STUDENT_NUM_CLASSES) ==
            UNDERSTUDY_NULL_POINTER;
    good &= understudy_classify(pixels, STUDENT_NUM_PIXELS, NULL, STUDENT_NUM_CLASSES) ==
            UNDERSTUDY_NULL_POINTER;
    good &= understudy_classify((const float *)(const void *)((const char *)pixels + 1),
                                STUDENT_NUM_PIXELS, logits,
                                STUDENT_NUM_CLASSES) == UNDERSTUDY_NOT_ALIGNED;
    good &= understudy_classify(pixels, STUDENT_NUM_PIXELS - 1, logits, STUDENT_NUM_CLASSES) ==
            UNDERSTUDY_WRONG_NUM_PIXELS;
    good &= understudy_classify(pixels, STUDENT_NUM_PIXELS, logits, STUDENT_NUM_CLASSES + 1) ==
            UNDERSTUDY_WRONG_NUM_LOGITS;
    const float bad[] = {NAN, INFINITY, -INFINITY, 1.01f, -0.01f, 255.0f};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
        pixels[STUDENT_NUM_PIXELS - 1] = bad[i];
        good &= understudy_classify(pixels, STUDENT_NUM_PIXELS, logits, STUDENT_NUM_CLASSES) ==
                UNDERSTUDY_BAD_PIXEL;
    }
    printf("wrong arguments: %s\n", good ? "refused" : "NOT refused");
    return good;
}

int main(void) {
#ifdef STUDENT_BARE_METAL
    board_init();
#endif
    int good = 1;
    for (size_t image = 0; image < TEST_NUM_IMAGES; ++image) {
        good &= check_image(image);
    }
    good &= check_errors();
    printf("%s: %u images, tolerance %.3g\n", good ? "PASS" : "FAIL", (unsigned)TEST_NUM_IMAGES,
           (double)TEST_TOLERANCE);
    fflush(stdout);
    return good ? 0 : 1;
}
