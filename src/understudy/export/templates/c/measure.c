/* On an emulated board: classifies the images of the host's file images.f32 into logits.f32 and
 * prints what each took, as JSON. Instructions are counted with SysTick under QEMU's
 * `-icount shift=0`, where every instruction takes one nanosecond of the board's time. */
#include <stdio.h>

#include "board.h"
#include "student.h"

#define CALIBRATION_LOOPS 1000000u

int main(void) {
    static float pixels[STUDENT_NUM_PIXELS];
    static float logits[STUDENT_NUM_CLASSES];
    unsigned long num_images = 0;
    unsigned long long total_ticks = 0, first_ticks = 0, least_ticks = 0, most_ticks = 0;
    unsigned long peak_stack_bytes = 0;

    board_init();
    const unsigned long long start = board_ticks();
    board_spin(CALIBRATION_LOOPS);
    const unsigned long long spin_ticks = board_ticks() - start;

    FILE *images_file = fopen("images.f32", "rb");
    FILE *logits_file = fopen("logits.f32", "wb");
    if (images_file == NULL || logits_file == NULL) {
        printf("images.f32 or logits.f32 cannot be opened\n");
        return 2;
    }
    while (fread(pixels, sizeof pixels, 1, images_file) == 1) {
        board_paint_stack();
        const unsigned long long before = board_ticks();
        const int code =
            understudy_classify(pixels, STUDENT_NUM_PIXELS, logits, STUDENT_NUM_CLASSES);
        const unsigned long long ticks = board_ticks() - before;
        const unsigned long stack_bytes = board_peak_stack_bytes();
        if (code != UNDERSTUDY_OK) {
            printf("image %lu: %s\n", num_images, understudy_error_text(code));
            return 2;
        }
        if (fwrite(logits, sizeof logits, 1, logits_file) != 1) {
            printf("logits.f32 cannot be written\n");
            return 2;
        }
        if (num_images == 0) {
            first_ticks = least_ticks = most_ticks = ticks;
        }
        least_ticks = ticks < least_ticks ? ticks : least_ticks;
        most_ticks = ticks > most_ticks ? ticks : most_ticks;
        peak_stack_bytes = stack_bytes > peak_stack_bytes ? stack_bytes : peak_stack_bytes;
        total_ticks += ticks;
        ++num_images;
    }
    if (fclose(logits_file) != 0) {
        printf("logits.f32 cannot be written\n");
        return 2;
    }
    printf("{\"num_images\": %lu, \"spin_instructions\": %lu, \"spin_ticks\": %llu, ", num_images,
           2ul * CALIBRATION_LOOPS, spin_ticks);
    printf("\"total_ticks\": %llu, \"first_ticks\": %llu, \"least_ticks\": %llu, ", total_ticks,
           first_ticks, least_ticks);
    printf("\"most_ticks\": %llu, \"peak_stack_bytes\": %lu}\n", most_ticks, peak_stack_bytes);
    fflush(stdout);
    return 0;
}
