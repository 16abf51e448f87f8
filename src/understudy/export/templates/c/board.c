#include "board.h"

#include <stdint.h>

#define SYSTICK_CONTROL (*(volatile uint32_t *)0xe000e010u)
#define SYSTICK_RELOAD (*(volatile uint32_t *)0xe000e014u)
#define SYSTICK_CURRENT (*(volatile uint32_t *)0xe000e018u)
#define SYSTICK_PERIOD UINT32_C(0x1000000)
#define PAINT UINT32_C(0x5aa5c33c)
#define SEMIHOSTING_EXIT_EXTENDED 0x20
#define APPLICATION_EXIT UINT32_C(0x20026)

extern uint32_t stack_bottom[];
/* Of newlib's librdimon. */
extern void initialise_monitor_handles(void);
void program_exit(int code);
void systick_handler(void);

static volatile uint32_t num_periods;
static uint32_t *painted_end;

void systick_handler(void) {
    ++num_periods;
}

void board_init(void) {
    initialise_monitor_handles();
    SYSTICK_RELOAD = SYSTICK_PERIOD - 1;
    SYSTICK_CURRENT = 0;
    SYSTICK_CONTROL = 7; /* on, with interrupt, from the processor clock */
    while (SYSTICK_CURRENT == 0) {
        /* It loads its first value a tick later, without an interrupt. */
    }
}

unsigned long long board_ticks(void) {
    uint32_t periods, current;
    do {
        periods = num_periods;
        current = SYSTICK_CURRENT;
    } while (periods != num_periods);
    return (unsigned long long)periods * SYSTICK_PERIOD + (SYSTICK_PERIOD - 1 - current);
}

void board_spin(unsigned num_loops) {
    __asm__ volatile("1: subs %0, %0, #1\n"
                     "   bne 1b\n"
                     : "+r"(num_loops)
                     :
                     : "cc");
}

static uint32_t *stack_pointer(void) {
    uint32_t *pointer;
    __asm__ volatile("mov %0, sp" : "=r"(pointer));
    return pointer;
}

__attribute__((noinline)) void board_paint_stack(void) {
    painted_end = stack_pointer();
    for (volatile uint32_t *word = stack_bottom; word < painted_end; ++word) {
        *word = PAINT;
    }
}

__attribute__((noinline)) unsigned long board_peak_stack_bytes(void) {
    const uint32_t *word = stack_bottom;
    while (word < painted_end && *word == PAINT) {
        ++word;
    }
    return (unsigned long)((const char *)painted_end - (const char *)word);
}

void program_exit(int code) {
    const uint32_t arguments[2] = {APPLICATION_EXIT, (uint32_t)code};
    register uint32_t operation __asm__("r0") = SEMIHOSTING_EXIT_EXTENDED;
    register const uint32_t *block __asm__("r1") = arguments;
    __asm__ volatile("bkpt 0xab" : : "r"(operation), "r"(block) : "memory");
    for (;;) {
    }
}
