"""Starts the process that an artifact is measured in, and answers for its failures."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from understudy.errors import InputError, MissingExtraError, UnderstudyError, problem
from understudy.evaluate import artifact_process
from understudy.evaluate.runtime_files import RuntimeFile, Source, runtime_file
from understudy.export.target_names import TARGETS
from understudy.runtime import num_usable_cores

NUM_WARMUP = 10
MIN_RUNS = 50


def resolve_num_threads(num_threads: int | Literal["all"]) -> int:
    """Return a number of threads; "all" is the number of processors this process may use."""
    return num_usable_cores() if num_threads == "all" else num_threads


def run_fresh(
    source: Source,
    images: ArrayLike,
    *,
    batch_size: int,
    num_threads: int,
    num_batches: int,
    min_seconds: float = 0.0,
    timeout_seconds: float = 300.0,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Measure an artifact in a new process and return what ``artifact_process`` tells of it.

    A process of its own, because the caller's threads, allocator and caches would be measured
    too. ``images`` (uint8 [n, C, H, W]) are handed over in a temporary file.

    Args:
        num_batches: different batches run in turn; one keeps the memory to what a batch needs.
        min_seconds: time runs for at least this long, and at least ``MIN_RUNS`` of them.
        more: of the request: another ``min_runs``, or ``energy`` as ``energy_request`` returns it.

    Raises:
        InputError: the file is missing, nothing is known to run it, its runtime refuses it, or the
            images do not fit.
        MissingExtraError: its runtime is not installed.
        UnderstudyError: the process died or ran past ``timeout_seconds``.
    """
    images_NCHW = np.asarray(images)
    check_request(source, images_NCHW, batch_size=batch_size, num_threads=num_threads)
    file = runtime_file(source)
    request = measure_request(
        batch_size=batch_size,
        num_threads=num_threads,
        num_batches=num_batches,
        min_seconds=min_seconds,
    ) | dict(more)
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        images_path = Path(folder) / "images.npy"
        np.save(images_path, images_NCHW[: num_batches * batch_size])
        request["images"] = str(images_path)
        what = f"measuring {file.path} at batch {batch_size}"
        return start_process(file, request, timeout_seconds=timeout_seconds, what=what)


def measure_request(
    *, batch_size: int, num_threads: int, num_batches: int, min_seconds: float
) -> dict[str, Any]:
    """Return what is asked of ``artifact_process.measure``, but for the files."""
    return {
        "mode": "measure",
        "batch_size": batch_size,
        "num_threads": num_threads,
        "num_batches": num_batches,
        "num_warmup": NUM_WARMUP,
        "min_runs": MIN_RUNS,
        "min_seconds": min_seconds,
    }


def describe_fresh(source: Source, *, timeout_seconds: float = 300.0) -> dict[str, Any]:
    """Return what an artifact's runtime tells of it once it is open: facts, versions, load_ms."""
    file = runtime_file(source)
    _check_exists(file)
    return start_process(
        file,
        {"mode": "describe", "num_threads": 1},
        timeout_seconds=timeout_seconds,
        what=f"opening {file.path}",
    )


def start_process(
    file: RuntimeFile, request: Mapping[str, Any], *, timeout_seconds: float, what: str
) -> dict[str, Any]:
    """Run one request in a new process and return its answer."""
    asked = {**request, "runtime": str(file.script), "artifact": str(file.path.resolve())}
    # By file name, not with -m: that would import the package first. -P keeps the script's
    # folder, and the modules in it, off the import path.
    command = [sys.executable, "-P", artifact_process.__file__, json.dumps(asked)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnderstudyError(
            problem(
                f"{what} was not done after {timeout_seconds:g} s",
                expected=f"{NUM_WARMUP + MIN_RUNS} runs in that time",
                mend="Measure a smaller batch, or choose a faster student.",
            )
        ) from None
    if done.returncode != 0:
        raise _failure(file, done, what=what)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check_request(
    source: Source, images_NCHW: np.ndarray, *, batch_size: int, num_threads: int
) -> None:
    """Raise an InputError that lists everything wrong with what is asked."""
    problems: list[str] = []
    try:
        _check_exists(runtime_file(source))
    except InputError as error:
        problems += error.problems
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


def _check_exists(file: RuntimeFile) -> None:
    if not file.path.exists():
        raise InputError(
            problem(
                f"there is no file {file.path}",
                expected="an exported file",
                mend="Export the student first.",
            )
        )


def failure_of(stdout: str) -> Mapping[str, Any]:
    """Return ``error``, ``text`` and ``missing`` of a process that told why it failed, or {}."""
    for line in reversed(stdout.splitlines()):
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and "error" in told:
            return told
    return MappingProxyType({})


def reason_of(stdout: str, stderr: str) -> str:
    """Return the process's own words for its failure, on one line."""
    told = failure_of(stdout)
    if told:
        return " ".join(f"{told['error']}: {told['text']}".split())
    # What stands behind the indented lines of a traceback: the exception's own text.
    lines = stderr.strip().splitlines()
    own_text = list(itertools.takewhile(lambda line: not line.startswith("  "), reversed(lines)))
    return " ".join(line.strip() for line in reversed(own_text)) or "it said nothing"


def _failure(
    file: RuntimeFile, done: subprocess.CompletedProcess[str], *, what: str
) -> UnderstudyError:
    missing = failure_of(done.stdout).get("missing")
    if missing and file.runtime in TARGETS:
        return MissingExtraError(str(missing), TARGETS[file.runtime])
    reason = reason_of(done.stdout, done.stderr)
    if done.returncode < 0:
        reason = f"ended by signal {-done.returncode}, 9 is often a lack of memory; {reason}"
    # A runtime that says no to a file is not a process that died.
    kind = InputError if failure_of(done.stdout) else UnderstudyError
    return kind(
        problem(
            f"{what} failed ({reason})",
            expected=f"{file.runtime} to load the file and run the images",
            mend="Export the model again, and check it with its parity test.",
        )
    )
