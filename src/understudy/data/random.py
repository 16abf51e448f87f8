"""Counter-based random numbers: every draw is a pure function of what it is for.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
turns a 128-bit counter and a 64-bit key into four 32-bit words. Here the key says which stream is
meant (seed and purpose) and the counter which draw of it (sample, view, block), so there is no
state: any subset of samples in any order, on any number of processes, sees the same words.

All transcendental functions in this package's views are evaluated in float64 on the CPU, on tables
or on one value per sample: vectorised float32 versions round differently at the end of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from understudy.runtime import derive_seed

UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]

NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK_32 = np.uint64(0xFFFFFFFF)
SHIFT_32 = np.uint64(32)

# Blocks of the per-pixel draws start here; the blocks below hold the draws per sample.
FIRST_PIXEL_BLOCK = 256

# Blocks computed at once: the temporaries of one pass stay in a processor's second-level cache.
BLOCKS_PER_PASS = 8192


def stream_key(seed: int, *names: str | int) -> tuple[int, int]:
    """Return the two 32-bit key words of one named stream under a recipe's seed."""
    key = derive_seed(seed, *names)
    return key & 0xFFFFFFFF, key >> 32


def philox_4x32(counter_4: tuple[UInt64, ...], key_2: tuple[UInt64, ...]) -> UInt32:
    """Return the four output words of Philox4x32-10, shape [4, ...].

    ``counter_4`` and ``key_2`` are four and two uint64 arrays that hold 32-bit values, all of the
    same number of dimensions; they broadcast against each other to the shape [...].
    """
    shape = np.broadcast_shapes(*(word.shape for word in (*counter_4, *key_2)))
    column = (2,) + (1,) * len(shape)
    even, odd = np.empty((2, *shape), np.uint64), np.empty((2, *shape), np.uint64)
    even[0], odd[0], even[1], odd[1] = counter_4
    key = np.stack(key_2)
    key_steps = np.array(KEY_STEPS, np.uint64).reshape(column)
    multipliers = np.array(MULTIPLIERS, np.uint64).reshape(column)
    for _ in range(NUM_ROUNDS):
        product = even * multipliers
        low = product & MASK_32
        product >>= SHIFT_32
        even = product[::-1] ^ odd
        even ^= key
        odd = low[::-1]
        key = (key + key_steps) & MASK_32
    return np.stack([even[0], odd[0], even[1], odd[1]]).astype(np.uint32)


def draw_words(
    keys_2B: UInt64, indices_N: NDArray[np.int64], view: int, blocks_B: UInt64
) -> UInt32:
    """Return uint32 words of shape [N, B, 4]: four for every sample and every (key, block) column.

    The counter is (sample index low, sample index high, view, block).
    """
    # Samples come last inside the generator: numpy is quick where the last axis is long.
    counter = _counter(indices_N[None], view, blocks_B[:, None])
    words_4BN = philox_4x32(counter, (keys_2B[0][:, None], keys_2B[1][:, None]))
    return words_4BN.transpose(2, 1, 0)


def _counter(indices: NDArray[np.int64], view: int, blocks: UInt64) -> tuple[UInt64, ...]:
    samples = indices.astype(np.uint64)
    return samples & MASK_32, samples >> SHIFT_32, np.full((1, 1), view, np.uint64), blocks


def uniforms(words: UInt32) -> NDArray[np.float64]:
    """Return float64 values strictly between 0 and 1, one per word."""
    return np.multiply(np.add(words, 0.5, dtype=np.float64), 2.0**-32, dtype=np.float64)


@dataclass(frozen=True)
class Draws:
    """What one transform drew for some samples of one view.

    ``uniforms_NK`` holds K values between 0 and 1 per sample; per-pixel values are made on demand.
    """

    uniforms_NK: NDArray[np.float64]
    key: tuple[int, int]
    indices_N: NDArray[np.int64]
    view: int

    def between(self, column: int, low_high: Sequence[float]) -> NDArray[np.float64]:
        """Return float64 [N], uniform from low to high."""
        low, high = low_high
        values: NDArray[np.float64] = low + (high - low) * self.uniforms_NK[:, column]
        return values

    def whole(self, column: int, num_values: int) -> NDArray[np.int64]:
        """Return int64 [N], each of 0..num_values - 1 equally often (to one part in 2^32)."""
        return (self.uniforms_NK[:, column] * num_values).astype(np.int64)

    def normals(self, num_values: int) -> torch.Tensor:
        """Return standard normal values, float32 [N, num_values] on the CPU."""
        return pixel_normals(self.key, self.indices_N, self.view, num_values)

    def chosen(self, rows: NDArray[np.int64]) -> Draws:
        """Return the draws of some of the samples."""
        return Draws(self.uniforms_NK[rows], self.key, self.indices_N[rows], self.view)


def pixel_normals(
    key: tuple[int, int], indices_N: NDArray[np.int64], view: int, num_values: int
) -> torch.Tensor:
    """Return standard normal values for every sample, float32 [N, num_values] on the CPU.

    Each value is the quantile of 16 random bits (inverse CDF from a table, so that the same bits
    give the same value in any batch and on any machine); the largest magnitude is 4.3.
    """
    num_blocks = -(-num_values // 8)
    key_2 = (np.full((1, 1), key[0], np.uint64), np.full((1, 1), key[1], np.uint64))
    blocks = np.arange(FIRST_PIXEL_BLOCK, FIRST_PIXEL_BLOCK + num_blocks, dtype=np.uint64)
    table = _normal_quantiles()
    normals_ND = np.empty((len(indices_N), num_values), np.float32)
    step = max(1, BLOCKS_PER_PASS // num_blocks)
    for start in range(0, len(indices_N), step):
        chosen = slice(start, start + step)
        words_4MB = philox_4x32(_counter(indices_N[chosen, None], view, blocks[None]), key_2)
        words_M4B = np.ascontiguousarray(words_4MB.transpose(1, 0, 2), dtype="<u4")
        bits = words_M4B.view("<u2").reshape(len(words_M4B), -1)[:, :num_values]
        normals_ND[chosen] = table.take(bits)
    return torch.from_numpy(normals_ND)


@cache
def _normal_quantiles() -> NDArray[np.float32]:
    """Return the 65,536 mid-point quantiles of the standard normal, rounded to multiples of 1/4096.

    The rounding makes the table the same on machines whose float64 functions differ in the last
    bit.
    """
    probabilities = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    quantiles = torch.special.ndtri(probabilities)
    rounded: NDArray[np.float32] = (torch.round(quantiles * 4096) / 4096).float().numpy()
    return rounded
