"""Peak resident memory of a process that runs an exported file in its runtime."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from numpy.typing import ArrayLike

from understudy.evaluate.fresh_process import run_fresh
from understudy.evaluate.runtime_files import Source


@dataclass(frozen=True)
class Memory:
    """Memory of a fresh process that loads the file and runs one batch several times.

    Attributes:
        peak_memory_bytes: the largest resident set of the whole process, nothing taken off:
            interpreter, NumPy and the runtime are in it, because a user pays for them. None where
            the system does not tell.
        baseline_memory_bytes: the same after the imports and before the file was loaded: what any
            model would cost. None where the system does not tell.
    """

    peak_memory_bytes: int | None
    baseline_memory_bytes: int | None
    batch_size: int
    num_threads: int

    def to_json(self) -> dict[str, Any]:
        """Return the result as a plain dict."""
        return asdict(self)


def measure_memory(
    source: Source,
    images: ArrayLike,
    *,
    batch_size: int = 1,
    num_threads: int = 1,
    timeout_seconds: float = 300.0,
) -> Memory:
    """Measure peak memory for one batch of uint8 images [n, C, H, W].

    Raises:
        InputError: the file is missing, nothing is known to run it, or the images do not fit.
        MissingExtraError: its runtime is not installed.
        UnderstudyError: the runtime fails on the file, or the process takes too long.
    """
    result = run_fresh(
        source,
        images,
        batch_size=batch_size,
        num_threads=num_threads,
        num_batches=1,
        timeout_seconds=timeout_seconds,
    )
    return memory_of(result, batch_size=batch_size, num_threads=num_threads)


def memory_of(result: dict[str, Any], *, batch_size: int, num_threads: int) -> Memory:
    """Return the record of one process's answer."""
    return Memory(
        peak_memory_bytes=result["peak_memory_bytes"],
        baseline_memory_bytes=result["baseline_memory_bytes"],
        batch_size=batch_size,
        num_threads=num_threads,
    )
