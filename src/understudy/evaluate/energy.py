"""Energy of one picture: from the machine's counters, or an estimate that says so, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import ArrayLike

from understudy.errors import InputError, problem
from understudy.evaluate import counters
from understudy.evaluate.fresh_process import run_fresh
from understudy.evaluate.runtime_files import Source

Method = Literal["counter", "estimate", "not measured"]
SECONDS = 3.0
IDLE_SECONDS = 1.0


@dataclass(frozen=True)
class Energy:
    """Energy of one picture, and how it was come by. The figure means nothing without the method.

    Attributes:
        energy_mj: millijoules a picture; None exactly if ``method`` is "not measured".
        method: "counter": read from the machine over a window of runs, what it takes idle taken
            off; "estimate": power times time, where the power is a figure that somebody gave.
        source: the counters, or who says what the power is; or why nothing was measured.
        watts: mean power above idle while running; of an estimate the power that was assumed.
        idle_watts: of the machine just before; None for an estimate.
        seconds, num_images: length of the window and pictures in it; of an estimate the time that
            was measured and the pictures in that.
    """

    energy_mj: float | None
    method: Method
    source: str
    watts: float | None = None
    idle_watts: float | None = None
    seconds: float | None = None
    num_images: int | None = None

    def __str__(self) -> str:
        if self.energy_mj is None:
            return f"not measured ({self.source})"
        if self.method == "estimate":
            return f"about {self.energy_mj:.4g} mJ a picture, estimate: {self.source}"
        return f"{self.energy_mj:.4g} mJ a picture above idle, from {self.source}"

    def to_json(self) -> dict[str, Any]:
        """Return the record as a plain dict."""
        return asdict(self)


def not_measured(reason: str) -> Energy:
    """Return the record of an energy that nobody knows."""
    return Energy(None, "not measured", reason)


def energy_of_window(window: Mapping[str, Any], *, images_a_run: int) -> Energy:
    """Return the energy in what ``counters.measure_window`` read."""
    if not window["counters"]:
        return not_measured(window["reason"])
    idle_watts = window["idle_uj"] / window["idle_seconds"] / 1e6
    watts = window["uj"] / window["seconds"] / 1e6 - idle_watts
    num_images = window["num_runs"] * images_a_run
    if watts <= 0:
        return not_measured(
            f"the counters rose no faster than idle ({idle_watts:.3g} W): other work on this "
            "machine disturbs, or the window is too short"
        )
    return Energy(
        energy_mj=watts * window["seconds"] * 1e3 / num_images,
        method="counter",
        source="counters " + ", ".join(window["counters"]),
        watts=watts,
        idle_watts=idle_watts,
        seconds=window["seconds"],
        num_images=num_images,
    )


def measure_energy(
    source: Source,
    images: ArrayLike,
    *,
    batch_size: int = 1,
    num_threads: int = 1,
    seconds: float = SECONDS,
    idle_seconds: float = IDLE_SECONDS,
    powercap: Path = Path(counters.POWERCAP),
) -> Energy:
    """Measure a file's energy in a fresh process, by the processor's counters (RAPL).

    They count the whole machine: anything else that starts or stops meanwhile is in the figure.

    Args:
        images: uint8 [n, C, H, W]; one batch of them is run again and again.
        seconds: length of the window of runs; ``idle_seconds`` that of the one before it.
        powercap: folder of the kernel's power capping framework.

    Raises:
        InputError, MissingExtraError, UnderstudyError: as ``run_fresh``.
    """
    found = counters.find_counters(str(powercap))
    if not found["counters"]:
        return not_measured(found["reason"])
    result = run_fresh(
        source,
        images,
        batch_size=batch_size,
        num_threads=num_threads,
        num_batches=1,
        more={"energy": energy_request(seconds, idle_seconds, powercap)},
    )
    return energy_of_window(result["energy"], images_a_run=batch_size)


def energy_request(seconds: float, idle_seconds: float, powercap: Path) -> dict[str, Any]:
    """Return what ``artifact_process.measure`` needs to read counters."""
    return {
        "script": counters.__file__,
        "powercap": str(powercap),
        "seconds": seconds,
        "idle_seconds": idle_seconds,
    }


def measure_energy_here(
    run: Callable[[], object],
    *,
    device: Literal["cpu", "cuda"],
    images_a_run: int,
    seconds: float = SECONDS,
    idle_seconds: float = IDLE_SECONDS,
) -> Energy:
    """Measure what this machine takes for ``run`` in this process.

    Args:
        run: runs ``images_a_run`` pictures and returns when they are done (synchronised).
        device: "cuda": all NVIDIA GPUs, by NVML; "cpu": the processor, by RAPL.
    """
    found = counters.find_gpu_counters() if device == "cuda" else counters.find_counters()
    window = counters.measure_window(run, found, seconds=seconds, idle_seconds=idle_seconds)
    return energy_of_window(window, images_a_run=images_a_run)


def estimate_energy(
    *, watts: float, source: str, milliseconds: float, num_images: int = 1
) -> Energy:
    """Return power times time: an estimate, as the power is not that of this run.

    Args:
        watts: above idle, while running.
        source: where that figure is from, for instance "assumed for a Raspberry Pi 4".
        milliseconds: measured time of one run of ``num_images`` pictures.

    Raises:
        InputError: a figure is not above 0, or the source is empty.
    """
    problems = [
        problem(f"{name} is {value}", expected="a number above 0", mend="Give it.")
        for name, value in (
            ("watts", watts),
            ("milliseconds", milliseconds),
            ("num_images", num_images),
        )
        if not 0 < value < float("inf")
    ]
    if not source.strip():
        problems.append(
            problem("a power without a source", expected="who says so", mend="Name the source.")
        )
    if problems:
        raise InputError(*problems)
    return Energy(
        energy_mj=watts * milliseconds / num_images,
        method="estimate",
        source=f"{watts:g} W ({source}) times {milliseconds:.4g} ms",
        watts=watts,
        seconds=milliseconds / 1e3,
        num_images=num_images,
    )
