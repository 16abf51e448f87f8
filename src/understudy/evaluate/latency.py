"""Latency and throughput of an exported file in its runtime, on real images."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from numpy.typing import ArrayLike

from understudy.evaluate.fresh_process import NUM_WARMUP, resolve_num_threads, run_fresh
from understudy.evaluate.runtime_files import Source, runtime_file
from understudy.progress import Progress, silent
from understudy.runtime import num_usable_cores, processor_name

NUM_BATCHES = 8


@dataclass(frozen=True)
class Measurement:
    """Time of one run at one batch size and number of threads, measured in a process of its own.

    A run is from NumPy float32 pixels to NumPy logits; decoding and scaling are not in it.

    Attributes:
        p50_ms, p95_ms, p99_ms: percentiles over the runs, each the time of a run that happened
            (nearest rank); with fewer than 100 runs p99 is the slowest run.
        images_per_second: batch_size over the mean time.
        num_runs: timed runs, after ``num_warmup`` that were not.
        load_ms: time from the file to something that runs, without the imports of its runtime and
            the compiling of C code.
    """

    batch_size: int
    num_threads: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    images_per_second: float
    num_runs: int
    num_warmup: int
    load_ms: float

    def to_json(self) -> dict[str, Any]:
        """Return the row as a plain dict."""
        return asdict(self)


@dataclass(frozen=True)
class Latency:
    """Measurements and the facts without which they mean nothing."""

    measurements: tuple[Measurement, ...]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return rows and facts as plain lists and dicts."""
        return {
            "measurements": [row.to_json() for row in self.measurements],
            "facts": self.facts,
        }


def percentile_ms(times_ns: Sequence[int], percentile: float) -> float:
    """Return the nearest-rank percentile: the smallest time that this share of runs kept."""
    rank = math.ceil(percentile / 100 * len(times_ns))
    return sorted(times_ns)[max(rank, 1) - 1] / 1e6


def measure_latency(
    source: Source,
    images: ArrayLike,
    *,
    batch_sizes: Sequence[int] = (1, 100),
    num_threads: Sequence[int | Literal["all"]] = (1, "all"),
    min_seconds: float = 1.0,
    timeout_seconds: float = 300.0,
    progress: Progress = silent,
) -> Latency:
    """Measure every batch size with every number of threads, one fresh process after the other.

    Args:
        source: an exported file whose suffix tells its runtime, an ``Artifact``, or a
            ``RuntimeFile``.
        images: uint8 [n, C, H, W], real ones; repeated where a batch needs more.
        num_threads: "all" is every processor this process may use; equal numbers are measured
            once.
        min_seconds: time runs for at least this long and at least
            ``fresh_process.MIN_RUNS`` times.
        timeout_seconds: for each process.
        progress: told the number of settings done.

    Raises:
        InputError: the file is missing, nothing is known to run it, or the images do not fit.
        MissingExtraError: its runtime is not installed.
        UnderstudyError: the runtime fails on the file, or a process takes too long.
    """
    threads = sorted({resolve_num_threads(count) for count in num_threads})
    settings = [(size, count) for count in threads for size in sorted(set(batch_sizes))]
    rows = []
    facts: dict[str, Any] = {
        "processor": processor_name(),
        "system": platform.platform(),
        "num_cores": num_usable_cores(),
        "python": platform.python_version(),
        "percentile": "nearest rank",
    }
    file = runtime_file(source)
    if file.runtime == "onnx":
        # Left as it is: what is measured is what a user with the same number of threads gets.
        facts["spinning"] = "ONNX Runtime's default (idle pool threads spin)"
    for num_done, (batch_size, count) in enumerate(settings):
        progress(num_done, len(settings), f"batch {batch_size}, threads {count}")
        result = run_fresh(
            file,
            images,
            batch_size=batch_size,
            num_threads=count,
            num_batches=NUM_BATCHES,
            min_seconds=min_seconds,
            timeout_seconds=timeout_seconds,
        )
        rows.append(measurement_of(result, batch_size=batch_size, num_threads=count))
        facts |= {"runtime": file.runtime} | result["versions"] | result["facts"]
    progress(len(settings), len(settings))
    return Latency(measurements=tuple(rows), facts=facts)


def measurement_of(result: dict[str, Any], *, batch_size: int, num_threads: int) -> Measurement:
    """Return the row of one process's answer."""
    times_ns = result["times_ns"]
    mean_ms = sum(times_ns) / len(times_ns) / 1e6
    return Measurement(
        batch_size=batch_size,
        num_threads=num_threads,
        p50_ms=percentile_ms(times_ns, 50),
        p95_ms=percentile_ms(times_ns, 95),
        p99_ms=percentile_ms(times_ns, 99),
        mean_ms=mean_ms,
        images_per_second=batch_size / mean_ms * 1e3,
        num_runs=len(times_ns),
        num_warmup=NUM_WARMUP,
        load_ms=result["load_ms"],
    )
