/* Start of a bare Cortex-M program: vector table, floating-point unit, memory, main. */
#include <stdint.h>

#define COPROCESSOR_ACCESS (*(volatile uint32_t *)0xe000ed88u)
#define NUM_SYSTEM_VECTORS 16
#define FAULT_EXIT_CODE 99

extern uint32_t data_start[], data_end[], data_load[], bss_start[], bss_end[], stack_top[];
int main(void);
void reset_handler(void);
void fault_handler(void);

/* The test programs replace these two; a product stops here. */
__attribute__((weak)) void systick_handler(void);
__attribute__((weak)) void program_exit(int code);

void systick_handler(void) {
}

void program_exit(int code) {
    (void)code;
    for (;;) {
    }
}

void fault_handler(void) {
    program_exit(FAULT_EXIT_CODE);
}

__attribute__((noreturn)) void reset_handler(void) {
#ifdef __ARM_FP
    COPROCESSOR_ACCESS |= UINT32_C(0xf) << 20;
    __asm__ volatile("dsb\n isb" : : : "memory");
#endif
    const uint32_t *source = data_load;
    for (uint32_t *word = data_start; word < data_end; ++word) {
        *word = *source++;
    }
    for (uint32_t *word = bss_start; word < bss_end; ++word) {
        *word = 0;
    }
    program_exit(main());
    for (;;) {
    }
}

typedef void (*vector)(void);

__attribute__((section(".vectors"), used)) static const vector vectors[NUM_SYSTEM_VECTORS] = {
    [0] = (vector)(uintptr_t)stack_top,
    [1] = reset_handler,
    [2] = fault_handler,  /* NMI */
    [3] = fault_handler,  /* hard fault */
    [4] = fault_handler,  /* memory management */
    [5] = fault_handler,  /* bus fault */
    [6] = fault_handler,  /* usage fault */
    [11] = fault_handler, /* supervisor call */
    [12] = fault_handler, /* debug monitor */
    [14] = fault_handler, /* pending service */
    [15] = systick_handler,
};
