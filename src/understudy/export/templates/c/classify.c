/* Reads images from standard input, as float32 pixels in [0, 1], channel by channel, one image
 * after the other, and writes the float32 logits of each to standard output. Both are in the byte
 * order of the machine. Returns 0, or 1 and a line on standard error. */
#include <stdio.h>

#include "student.h"

int main(void) {
    static float pixels[STUDENT_NUM_PIXELS];
    static float logits[STUDENT_NUM_CLASSES];
    unsigned long image = 0;

    for (;; ++image) {
        const size_t num_bytes = fread(pixels, 1, sizeof pixels, stdin);
        if (num_bytes == 0 && !ferror(stdin)) {
            break;
        }
        if (num_bytes != sizeof pixels) {
            fprintf(stderr, "image %lu: %lu bytes instead of %lu\n", image,
                    (unsigned long)num_bytes, (unsigned long)sizeof pixels);
            return 1;
        }
        const int code =
            understudy_classify(pixels, STUDENT_NUM_PIXELS, logits, STUDENT_NUM_CLASSES);
        if (code != UNDERSTUDY_OK) {
            fprintf(stderr, "image %lu: %s\n", image, understudy_error_text(code));
            return 1;
        }
        if (fwrite(logits, sizeof logits, 1, stdout) != 1) {
            fprintf(stderr, "image %lu: the logits cannot be written\n", image);
            return 1;
        }
    }
    if (image == 0) {
        fprintf(stderr, "there is no image on standard input\n");
        return 1;
    }
    if (fflush(stdout) != 0) {
        fprintf(stderr, "the logits cannot be written\n");
        return 1;
    }
    return 0;
}
