/* What the kernels share: vectors of floats by GNU C, no intrinsics. */
#ifndef UNDERSTUDY_KERNELS_H
#define UNDERSTUDY_KERNELS_H

#include <stdint.h>

/* Floats in a vector: as many as a register holds, unless a source needs a number of its own. */
#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const float *p) { return *(const floats *)p; }
INLINE void store(float *p, floats v) { *(floats *)p = v; }

/* The first channel of a vector. The last vector overlaps the one before where c, at least LANES, is
 * no multiple of it: what it computes twice is stored twice, never added twice. */
INLINE long channel(long first, long c) { return first + LANES <= c ? first : c - LANES; }

#endif
