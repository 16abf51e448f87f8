/* Names the likeliest classes of one picture: classify PICTURE [TOP]
 *
 * The picture is a binary PPM (P6) where the student takes colours, a binary PGM (P5) where it takes
 * grey, of exactly the student's size, 8 bits a value. Exit codes are those of enum exit_code.
 *
 * The picture is the only file that it reads: weights and class names are compiled in, so there is
 * nothing to check when it runs. The sources have their SHA-256 in ../manifest.json; `understudy
 * predict` checks all of them before it compiles, and whoever has only the package can compare them
 * before `make`.
 */
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include "package.h"
#include "student.h"

#define NUM_PIXELS ((size_t)NUM_CHANNELS * HEIGHT * WIDTH)
#define MAX_HEADER_NUMBER 1000000u

enum exit_code {
    DONE = 0,
    STUDENT_FAILED = 1,
    WRONG_USAGE = 2,
    CANNOT_OPEN = 3,
    NOT_A_PICTURE = 4,
    WRONG_SIZE = 5,
    WRONG_DEPTH = 6,
    TRUNCATED = 7,
    TRAILING_BYTES = 8,
    NOT_FINITE = 9
};

static unsigned char bytes_hwc[NUM_PIXELS];
static float pixels_chw[NUM_PIXELS];
static float logits[NUM_CLASSES];
static double shares[NUM_CLASSES];

static int is_space(int c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\v' || c == '\f' || c == '\r';
}

/* Reads one number of the header with the single character behind it, which must be a space: behind
 * the last number pixels begin. Comments run from # to the end of the line. Returns 0 when it
 * worked. */
static int read_number(FILE *file, unsigned *number)
{
    int c = fgetc(file);
    while (is_space(c) || c == '#') {
        if (c == '#')
            while (c != '\n' && c != '\r' && c != EOF)
                c = fgetc(file);
        if (c != EOF)
            c = fgetc(file);
    }
    if (c < '0' || c > '9')
        return -1;
    *number = 0;
    while (c >= '0' && c <= '9') {
        *number = *number * 10 + (unsigned)(c - '0');
        if (*number > MAX_HEADER_NUMBER)
            return -1;
        c = fgetc(file);
    }
    return is_space(c) ? 0 : -1;
}

static enum exit_code read_picture(FILE *file)
{
    const int kind = NUM_CHANNELS == 1 ? '5' : '6';
    unsigned width, height, maximum;

    if (fgetc(file) != 'P' || fgetc(file) != kind || read_number(file, &width) != 0 ||
        read_number(file, &height) != 0 || read_number(file, &maximum) != 0) {
        fprintf(stderr, "not a binary picture with the header P%c; convert it to one\n", kind);
        return NOT_A_PICTURE;
    }
    if (width != WIDTH || height != HEIGHT) {
        fprintf(stderr, "the picture is %ux%u pixels; expected %dx%d (width x height)\n", width,
                height, WIDTH, HEIGHT);
        return WRONG_SIZE;
    }
    if (maximum != 255) {
        fprintf(stderr, "the largest value is %u; expected 255 (8 bits)\n", maximum);
        return WRONG_DEPTH;
    }
    if (fread(bytes_hwc, 1, NUM_PIXELS, file) != NUM_PIXELS) {
        fprintf(stderr, "the picture ends early; expected %lu bytes of pixels\n",
                (unsigned long)NUM_PIXELS);
        return TRUNCATED;
    }
    if (fgetc(file) != EOF) {
        fprintf(stderr, "there are bytes behind the pixels; expected one picture\n");
        return TRAILING_BYTES;
    }
    return DONE;
}

static void scale_pixels(void)
{
    const size_t area = (size_t)HEIGHT * WIDTH;
    for (size_t place = 0; place < area; place++)
        for (size_t channel = 0; channel < NUM_CHANNELS; channel++)
            pixels_chw[channel * area + place] =
                (float)bytes_hwc[place * NUM_CHANNELS + channel] / 255.0f;
}

/* Turns logits into shares that add up to 1. Returns 0 when all are finite. */
static int softmax(void)
{
    double largest = logits[0], sum = 0;
    for (int k = 0; k < NUM_CLASSES; k++) {
        if (!isfinite(logits[k]))
            return -1;
        if (logits[k] > largest)
            largest = logits[k];
    }
    for (int k = 0; k < NUM_CLASSES; k++) {
        shares[k] = exp(logits[k] - largest);
        sum += shares[k];
    }
    for (int k = 0; k < NUM_CLASSES; k++)
        shares[k] /= sum;
    return 0;
}

/* Prints the likeliest classes; of equal logits the first class is first. */
static void print_classes(long top)
{
    for (long row = 0; row < top && row < NUM_CLASSES; row++) {
        int best = -1;
        for (int k = 0; k < NUM_CLASSES; k++)
            if (shares[k] >= 0 && (best < 0 || logits[k] > logits[best]))
                best = k;
        printf("%.6f\t%s\n", shares[best], CLASS_NAMES[best]);
        shares[best] = -1;
    }
}

static int parse_top(const char *text, long *top)
{
    char *end;
    errno = 0;
    *top = strtol(text, &end, 10);
    return errno != 0 || end == text || *end != '\0' || *top < 1 ? -1 : 0;
}

int main(int argc, char **argv)
{
    long top = 3;
    enum exit_code code;
    int error;
    FILE *file;

    if (argc < 2 || argc > 3 || (argc == 3 && parse_top(argv[2], &top) != 0)) {
        fprintf(stderr, "usage: classify PICTURE [TOP], TOP at least 1\n");
        return WRONG_USAGE;
    }
    file = fopen(argv[1], "rb");
    if (file == NULL) {
        perror(argv[1]);
        return CANNOT_OPEN;
    }
    code = read_picture(file);
    fclose(file);
    if (code != DONE)
        return code;
    scale_pixels();
    error = understudy_classify(pixels_chw, NUM_PIXELS, logits, NUM_CLASSES);
    if (error != 0) {
        fprintf(stderr, "the student failed with error %d of student.h\n", error);
        return STUDENT_FAILED;
    }
    if (softmax() != 0) {
        fprintf(stderr, "the student returned NaN or infinity\n");
        return NOT_FINITE;
    }
    print_classes(top);
    return DONE;
}
