"""Energy counters of the machine, read in the process that runs the artifact.

A plain script of the standard library, because it also goes to devices: see ``artifact_process``.
Sources: the Linux kernel's power capping framework (Documentation/power/powercap) for processors,
and NVML's ``nvmlDeviceGetTotalEnergyConsumption`` for NVIDIA GPUs (Volta or newer).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POWERCAP = "/sys/class/powercap"
SETTLE_SECONDS = 0.2


class PowercapCounter:
    """One zone, such as a processor package; microjoules that start again at ``range_uj``."""

    def __init__(self, name: str, path: Path, range_uj: int) -> None:
        self.name = name
        self.path = path
        self.range_uj = range_uj

    def read_uj(self) -> int:
        """Return the counter as it stands."""
        return int(self.path.read_text())


class NvmlCounter:
    """One GPU; its counter starts at the driver's start and does not wrap in practice."""

    range_uj = 0

    def __init__(self, name: str, library: Any, handle: Any) -> None:
        self.name = name
        self.library = library
        self.handle = handle

    def read_uj(self) -> int:
        """Return the counter as it stands."""
        return int(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) * 1000


def find_counters(powercap: str = POWERCAP) -> dict[str, Any]:
    """Return {"counters": list, "reason": why there are none, or an empty string}.

    Packages count, and memory beside them; cores and graphics are inside their package, and the
    same package again under ``intel-rapl-mmio``.
    """
    folder, counters, unreadable = Path(powercap), [], []
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not (name.startswith("package") or name == "dram"):
                continue
            range_uj = int((zone / "max_energy_range_uj").read_text())
            counter = PowercapCounter(zone.name + " " + name, zone / "energy_uj", range_uj)
            counter.read_uj()
            counters.append(counter)
        except OSError as error:
            unreadable.append(f"{zone.name}: {error.strerror}")
    if unreadable:
        # A part of the energy would pass for all of it.
        return {"counters": [], "reason": "counters cannot be read: " + ", ".join(unreadable)}
    reason = "" if counters else f"the machine has no energy counters in {powercap}"
    return {"counters": counters, "reason": reason}


def find_gpu_counters() -> dict[str, Any]:
    """Return the counters of all NVIDIA GPUs, as ``find_counters`` does."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return {"counters": [], "reason": "the package 'nvidia-ml-py' is not installed"}
    counters: list[NvmlCounter] = []
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            counter = NvmlCounter(f"GPU {index}", pynvml, handle)
            counter.read_uj()
            counters.append(counter)
    except pynvml.NVMLError as error:
        return {"counters": [], "reason": f"NVML: {error}"}
    return {"counters": counters, "reason": "" if counters else "there is no NVIDIA GPU"}


def spent_uj(counters: Any, before: list[int], after: list[int]) -> int:
    """Return the microjoules between two readings, at most one wrap of each counter apart."""
    total = 0
    for counter, first, last in zip(counters, before, after):  # noqa: B905 - Python 3.9 runs this
        total += last - first + (counter.range_uj if last < first else 0)
    return total


def measure_window(
    run: Callable[[], Any],
    found: dict[str, Any],
    *,
    seconds: float,
    idle_seconds: float,
) -> dict[str, Any]:
    """Read the counters over an idle window and then over repeated runs.

    Both windows are far shorter than a counter takes to wrap (minutes at full power).

    Returns:
        {"counters": names, "reason": ...} and, where there are counters, ``idle_uj``,
        ``idle_seconds``, ``uj``, ``seconds`` and ``num_runs``.
    """
    counters = found["counters"]
    result: dict[str, Any] = {"counters": [c.name for c in counters], "reason": found["reason"]}
    if not counters:
        return result
    time.sleep(SETTLE_SECONDS)  # threads that spin after a run are not idle yet
    before, start = [c.read_uj() for c in counters], time.perf_counter()
    time.sleep(idle_seconds)
    after, stop = [c.read_uj() for c in counters], time.perf_counter()
    result.update(idle_uj=spent_uj(counters, before, after), idle_seconds=stop - start)

    num_runs, before, start = 0, [c.read_uj() for c in counters], time.perf_counter()
    while num_runs == 0 or time.perf_counter() - start < seconds:
        run()
        num_runs += 1
    after, stop = [c.read_uj() for c in counters], time.perf_counter()
    result.update(uj=spent_uj(counters, before, after), seconds=stop - start, num_runs=num_runs)
    return result
