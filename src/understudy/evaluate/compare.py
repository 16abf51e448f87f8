"""Two or more artifacts measured against each other, in turn, so that the machine cancels out."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from numpy.typing import ArrayLike

from understudy.errors import InputError, problem
from understudy.evaluate.fresh_process import resolve_num_threads, run_fresh
from understudy.evaluate.latency import NUM_BATCHES
from understudy.evaluate.runtime_files import RuntimeFile, Source, runtime_file
from understudy.evaluate.text_table import text_table
from understudy.progress import Progress, silent
from understudy.runtime import num_usable_cores, processor_name

NUM_ROUNDS = 7
MIN_ROUNDS = 2
RUNS_A_ROUND = 15  # at least; the rounds are what the spread is over


@dataclass(frozen=True)
class Ratio:
    """Time of one artifact as a ratio to the first one's, at one setting. Below 1 is faster.

    A round measures every artifact once, each in a process of its own; what else the machine does
    changes slowly, so the two times of one round are neighbours and their ratio is kept.

    Attributes:
        ratio: median over the rounds of (median of its runs / median of the first one's runs).
        lower, upper: quartiles over the rounds.
        num_rounds: n of these.
        p50_ms, reference_p50_ms: medians over the rounds of the medians of the runs.
    """

    name: str
    reference: str
    batch_size: int
    num_threads: int
    ratio: float
    lower: float
    upper: float
    num_rounds: int
    p50_ms: float
    reference_p50_ms: float

    @property
    def verdict(self) -> Literal["faster", "slower", "no clear difference"]:
        """What the middle half of the rounds agrees on."""
        if self.upper < 1:
            return "faster"
        return "slower" if self.lower > 1 else "no clear difference"

    def to_json(self) -> dict[str, Any]:
        """Return the row and its verdict as a plain dict."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Comparison:
    """The ratios of every artifact but the first, at every setting, and what they were taken on."""

    ratios: tuple[Ratio, ...]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return rows and facts as plain lists and dicts."""
        return {"ratios": [row.to_json() for row in self.ratios], "facts": self.facts}

    def to_text(self) -> str:
        """Return a table of text."""
        rows = [
            [
                row.name,
                row.reference,
                row.batch_size,
                row.num_threads,
                f"{row.p50_ms:.4g}",
                f"{row.reference_p50_ms:.4g}",
                f"{row.ratio:.3f} ({row.lower:.3f} to {row.upper:.3f})",
                row.num_rounds,
                row.verdict,
            ]
            for row in self.ratios
        ]
        titles = ["file", "against", "batch", "threads", "ms", "ms of that"]
        titles += ["ratio (quartiles)", "n", ""]
        return text_table(titles, rows)


def compare_artifacts(
    sources: Sequence[Source],
    images: ArrayLike,
    *,
    batch_sizes: Sequence[int] = (1, 100),
    num_threads: Sequence[int | Literal["all"]] = (1,),
    num_rounds: int = NUM_ROUNDS,
    min_seconds: float = 0.3,
    progress: Progress = silent,
) -> Comparison:
    """Measure artifacts in alternating fresh processes: 1, 2, 3, then 3, 2, 1, and so on.

    Turning the order round keeps a machine that gets slower from favouring the first one.

    Args:
        sources: the reference first, then what is compared with it; any runtimes.
        images: uint8 [n, C, H, W].
        num_rounds: of which each gives one ratio at each setting.
        min_seconds: runs of one process last at least this long.

    Raises:
        InputError: fewer than two artifacts or rounds, or as ``run_fresh``.
        MissingExtraError, UnderstudyError: as ``run_fresh``.
    """
    files = [runtime_file(source) for source in sources]
    _check(files, num_rounds)
    names = _names(files)
    threads = sorted({resolve_num_threads(count) for count in num_threads})
    settings = [(size, count) for count in threads for size in sorted(set(batch_sizes))]
    medians: dict[tuple[int, int, str], list[float]] = {}
    facts: dict[str, Any] = {
        "processor": processor_name(),
        "num_cores": num_usable_cores(),
        "min_seconds": min_seconds,
        "files": {},
    }
    total, done = num_rounds * len(settings) * len(files), 0
    for turn, (size, count) in itertools.product(range(num_rounds), settings):
        for name, file in list(zip(names, files, strict=True))[:: -1 if turn % 2 else 1]:
            progress(done, total, f"{name}, batch {size}, threads {count}")
            result = run_fresh(
                file,
                images,
                batch_size=size,
                num_threads=count,
                num_batches=NUM_BATCHES,
                min_seconds=min_seconds,
                more={"min_runs": RUNS_A_ROUND},
            )
            median_ms = statistics.median(result["times_ns"]) / 1e6
            medians.setdefault((size, count, name), []).append(median_ms)
            facts["files"][name] = {"runtime": file.runtime, "size_bytes": file.size_bytes}
            facts["files"][name] |= result["versions"] | result["facts"]
            done += 1
    progress(total, total)
    ratios = []
    for (size, count), name in itertools.product(settings, names[1:]):
        row = ratio_of(name, medians[size, count, name], names[0], medians[size, count, names[0]])
        ratios.append(Ratio(**row, batch_size=size, num_threads=count))
    return Comparison(tuple(ratios), facts)


def ratio_of(
    name: str, times_ms: Sequence[float], reference: str, reference_ms: Sequence[float]
) -> dict[str, Any]:
    """Return the attributes of a ``Ratio`` that come from the times of the rounds."""
    ratios = [own / other for own, other in zip(times_ms, reference_ms, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "name": name,
        "reference": reference,
        "ratio": middle,
        "lower": lower,
        "upper": upper,
        "num_rounds": len(ratios),
        "p50_ms": statistics.median(times_ms),
        "reference_p50_ms": statistics.median(reference_ms),
    }


def _names(files: Sequence[RuntimeFile]) -> list[str]:
    """Return a name for each: runtime and file, with the folder or a number where needed."""
    names: list[str] = []
    for file in files:
        name = file.label
        if [other.label for other in files].count(name) > 1:
            name = f"{file.runtime} {file.path}"
        names.append(f"{name} ({names.count(name) + 1})" if name in names else name)
    return names


def _check(files: Sequence[RuntimeFile], num_rounds: int) -> None:
    problems = []
    if len(files) < 2:
        problems.append(
            problem(
                f"{len(files)} file to compare", expected="two or more", mend="Name another one."
            )
        )
    if num_rounds < MIN_ROUNDS:
        problems.append(
            problem(
                f"{num_rounds} round", expected=f"at least {MIN_ROUNDS}", mend="Give more rounds."
            )
        )
    if problems:
        raise InputError(*problems)
