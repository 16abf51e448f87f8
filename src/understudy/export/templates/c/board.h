/* What the test programs need of an emulated Cortex-M board. The student itself needs none of it. */
#ifndef BOARD_H
#define BOARD_H

/* Open the host's console and files (semihosting) and start the clock. */
void board_init(void);

/* Ticks of the processor clock since board_init. */
unsigned long long board_ticks(void);

/* Run exactly two instructions `num_loops` times. */
void board_spin(unsigned num_loops);

/* Fill the unused stack with a pattern; later tell how many bytes below it were used since. */
void board_paint_stack(void);
unsigned long board_peak_stack_bytes(void);

#endif
