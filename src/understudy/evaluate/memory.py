"""Peak resident memory of a process that runs an exported file in ONNX Runtime."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from understudy.evaluate.fresh_process import run_fresh


@dataclass(frozen=True)
class Memory:
    """Memory of a fresh process that loads the file and runs one batch several times.

    Attributes:
        peak_memory_bytes: the largest resident set of the whole process, nothing taken off:
            interpreter, NumPy and ONNX Runtime are in it, because a user pays for them. None where
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
    path: Path,
    images: ArrayLike,
    *,
    batch_size: int = 1,
    num_threads: int = 1,
    timeout_seconds: float = 300.0,
) -> Memory:
    """Measure peak memory for one batch of uint8 images [n, C, H, W].

    Raises:
        InputError: the file is missing or the images do not fit.
        UnderstudyError: ONNX Runtime fails on the file, or the process takes too long.
    """
    result = run_fresh(
        path,
        images,
        batch_size=batch_size,
        num_threads=num_threads,
        num_batches=1,
        timeout_seconds=timeout_seconds,
    )
    return Memory(
        peak_memory_bytes=result["peak_memory_bytes"],
        baseline_memory_bytes=result["baseline_memory_bytes"],
        batch_size=batch_size,
        num_threads=num_threads,
    )
