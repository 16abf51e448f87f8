"""Starts the process that an exported file is measured in, and answers for its failures."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from understudy.errors import InputError, UnderstudyError, problem
from understudy.evaluate import measure_onnx
from understudy.runtime import num_usable_cores

NUM_WARMUP = 10
MIN_RUNS = 50


def resolve_num_threads(num_threads: int | Literal["all"]) -> int:
    """Return a number of threads; "all" is the number of processors this process may use."""
    return num_usable_cores() if num_threads == "all" else num_threads


def run_fresh(
    path: Path,
    images: ArrayLike,
    *,
    batch_size: int,
    num_threads: int,
    num_batches: int,
    min_seconds: float = 0.0,
    timeout_seconds: float = 300.0,
) -> dict[str, Any]:
    """Measure an ONNX file in a new process and return what ``measure_onnx.measure`` returns.

    A process of its own, because the caller's threads, allocator and caches would be measured
    too. ``images`` (uint8 [n, C, H, W]) are handed over in a temporary file.

    Args:
        num_batches: different batches run in turn; one keeps the memory to what a batch needs.
        min_seconds: time runs for at least this long, and at least ``MIN_RUNS`` of them.

    Raises:
        InputError: the file is missing or the images do not fit.
        UnderstudyError: the process failed or ran past ``timeout_seconds``.
    """
    images_NCHW = np.asarray(images)
    _check_request(path, images_NCHW, batch_size=batch_size, num_threads=num_threads)
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        images_path = Path(folder) / "images.npy"
        np.save(images_path, images_NCHW[: num_batches * batch_size])
        request = {
            "model": str(path),
            "images": str(images_path),
            "batch_size": batch_size,
            "num_threads": num_threads,
            "num_batches": num_batches,
            "num_warmup": NUM_WARMUP,
            "min_runs": MIN_RUNS,
            "min_seconds": min_seconds,
        }
        # By file name, not with -m: that would import the package first. -P keeps the script's
        # folder, and the modules in it, off the import path.
        command = [sys.executable, "-P", measure_onnx.__file__, json.dumps(request)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise UnderstudyError(
                problem(
                    f"measuring {path} at batch {batch_size} was not done after "
                    f"{timeout_seconds:g} s",
                    expected=f"{NUM_WARMUP + MIN_RUNS} runs in that time",
                    mend="Measure a smaller batch, or choose a faster student.",
                )
            ) from None
    if done.returncode != 0:
        raise _failure(path, done, batch_size=batch_size)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _check_request(
    path: Path, images_NCHW: np.ndarray, *, batch_size: int, num_threads: int
) -> None:
    problems = []
    if not path.is_file():
        problems.append(
            problem(
                f"there is no file {path}",
                expected="an exported ONNX file",
                mend="Export the student first.",
            )
        )
    if images_NCHW.ndim != 4 or images_NCHW.dtype != np.uint8 or math.prod(images_NCHW.shape) == 0:
        problems.append(
            problem(
                f"the images to measure with are {images_NCHW.dtype} of {images_NCHW.shape}",
                expected="uint8 [n, C, H, W], n at least 1",
                mend="Give images of the test split.",
            )
        )
    problems += [
        problem(
            f"{name} is {value}",
            expected="at least 1",
            mend="Give a count of at least 1.",
        )
        for name, value in (("batch_size", batch_size), ("num_threads", num_threads))
        if value < 1
    ]
    if problems:
        raise InputError(*problems)


def _failure(
    path: Path, done: subprocess.CompletedProcess[str], *, batch_size: int
) -> UnderstudyError:
    # What stands behind the indented lines of the traceback: the exception's own text.
    lines = done.stderr.strip().splitlines()
    own_text = list(itertools.takewhile(lambda line: not line.startswith("  "), reversed(lines)))
    reason = " ".join(line.strip() for line in reversed(own_text)) or "it said nothing"
    if done.returncode < 0:
        reason = f"ended by signal {-done.returncode}, 9 is often a lack of memory; {reason}"
    return UnderstudyError(
        problem(
            f"measuring {path} at batch {batch_size} failed ({reason})",
            expected="ONNX Runtime to load the file and run the images",
            mend="Export the model again, and check it with its parity test.",
        )
    )
