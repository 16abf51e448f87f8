"""Everything that running one artifact costs, in one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from understudy.errors import InputError, problem
from understudy.evaluate.budget import BudgetFacts, BudgetRow, check_budget
from understudy.evaluate.c_size import c_model_size, compiled_bytes
from understudy.evaluate.devices import Device, device_limits, estimate_time, facts_for
from understudy.evaluate.energy import Energy, estimate_energy, measure_energy
from understudy.evaluate.latency import Latency, measure_latency
from understudy.evaluate.memory import Memory, measure_memory
from understudy.evaluate.remote import Ssh, measure_remote
from understudy.evaluate.runtime_files import RuntimeFile, Source, runtime_file
from understudy.evaluate.text_table import human_bytes, text_table
from understudy.evaluate.tflm_arena import arena_bytes
from understudy.evaluate.tflm_instructions import TflmInstructions, count_instructions
from understudy.progress import Progress, silent

NUM_EMULATED_IMAGES = 20


@dataclass(frozen=True)
class ArtifactProfile:
    """Size, times, memory and energy of one artifact, and what a device's limits say to them.

    Attributes:
        where: "this machine", or the host that it was measured on.
        energy: of one picture at the smallest batch and number of threads, which memory is of too.
        budget: rows of the device's limits; empty without a device.
        notes: sentences that belong to the figures.
        arena_bytes: static memory that TensorFlow Lite Micro needs for the file; None for other
            runtimes.
        instructions: of TensorFlow Lite Micro for one picture, or why they were not counted; None
            for other runtimes.
    """

    name: str
    runtime: str
    where: str
    size_bytes: int
    latency: Latency
    memory: Memory
    energy: Energy
    device: str | None = None
    budget: tuple[BudgetRow, ...] = ()
    notes: tuple[str, ...] = ()
    arena_bytes: int | None = None
    instructions: TflmInstructions | str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain lists and dicts."""
        return {
            "name": self.name,
            "runtime": self.runtime,
            "where": self.where,
            "size_bytes": self.size_bytes,
            "latency": self.latency.to_json(),
            "memory": self.memory.to_json(),
            "energy": self.energy.to_json(),
            "device": self.device,
            "budget": [row.to_json() for row in self.budget],
            "notes": list(self.notes),
            "arena_bytes": self.arena_bytes,
            "instructions": self.instructions.to_json()
            if isinstance(self.instructions, TflmInstructions)
            else self.instructions,
        }

    def to_text(self) -> str:
        """Return tables of text."""
        facts, memory = self.latency.facts, self.memory
        rows = [
            [
                row.batch_size,
                row.num_threads,
                *(f"{value:.4g}" for value in (row.p50_ms, row.p95_ms, row.p99_ms)),
                f"{row.images_per_second:.0f}",
                row.num_runs,
                f"{row.load_ms:.4g}",
            ]
            for row in self.latency.measurements
        ]
        titles = ["batch", "threads", "p50 ms", "p95 ms", "p99 ms", "images/s", "runs", "load ms"]
        lines = [
            f"{self.name} in {self.runtime} on {self.where}",
            f"{facts.get('board') or facts['processor']}, {facts['num_cores']} cores",
            f"size     {human_bytes(self.size_bytes)} ({self.size_bytes} bytes)",
            f"memory   {human_bytes(memory.peak_memory_bytes)} at most, of which "
            f"{human_bytes(memory.baseline_memory_bytes)} before the file is opened",
            f"energy   {self.energy}",
            text_table(titles, rows),
        ]
        if self.arena_bytes is not None:
            told = f"{human_bytes(self.arena_bytes)} ({self.arena_bytes} bytes)"
            lines.insert(3, f"arena    {told}, with pointers of 64 bits")
        if self.instructions is not None:
            is_counted = isinstance(self.instructions, TflmInstructions)
            told = f"{'' if is_counted else 'instructions not measured: '}{self.instructions}"
            lines.insert(4, f"work     {told}")
        return "\n".join([*lines, *limit_lines(self.device, self.budget, self.notes)])


def limit_lines(device: str | None, budget: Sequence[BudgetRow], notes: Sequence[str]) -> list[str]:
    """Return a table of a device's limits, where there are some, and the notes, as lines."""
    lines = []
    if budget:
        cells = [
            [row.name, f"{row.limit:,.10g} {row.unit}", row.status.replace("_", " "), row.detail]
            for row in budget
        ]
        lines = [f"limits of {device}", text_table(["limit", "at most", "status", ""], cells)]
    return [*lines, *(f"note: {note}" for note in notes)]


def profile_artifact(
    source: Source,
    images: ArrayLike,
    *,
    batch_sizes: Sequence[int] = (1, 100),
    num_threads: Sequence[int | Literal["all"]] = (1,),
    device: Device | None = None,
    ssh: Ssh | None = None,
    min_seconds: float = 1.0,
    progress: Progress = silent,
) -> ArtifactProfile:
    """Measure an artifact on this machine, or over ssh on another one.

    Args:
        images: uint8 [n, C, H, W].
        device: its limits are judged; its latency limit is measured too. Where this machine is not
            that device and ``ssh`` is not given, only sizes are judged and the rest is "not
            measured".
        ssh: the device to measure on.

    Raises:
        InputError, MissingExtraError, UnderstudyError: as ``measure_latency`` and
            ``measure_remote``.
    """
    file = runtime_file(source)
    sizes, threads = list(batch_sizes), list(num_threads)
    limit = device_limits(device).latency_ms if device is not None else None
    if limit is not None:
        sizes.append(limit.batch)
        threads.append(limit.threads)
    latency, memory, energy = _figures(
        file, images, sizes, threads, ssh=ssh, min_seconds=min_seconds, progress=progress
    )
    is_there = ssh is not None or device is None or device.is_this_machine
    if is_there:
        energy = _estimated(energy, latency, device)
    is_micro = file.runtime == "tflm" and ssh is None
    profile = ArtifactProfile(
        name=file.path.name,
        runtime=file.runtime,
        where="this machine" if ssh is None else ssh.host,
        size_bytes=file.size_bytes,
        latency=latency,
        memory=memory,
        energy=energy,
        arena_bytes=arena_bytes(file.path) if is_micro else None,
        instructions=count_instructions(file.path, images) if is_micro else None,
    )
    if device is None:
        return profile
    chip, notes = _emulated(file, images, device)
    return _judged(profile, file, device, chip, notes, is_there=is_there)


def _figures(
    file: RuntimeFile,
    images: ArrayLike,
    sizes: Sequence[int],
    threads: Sequence[int | Literal["all"]],
    *,
    ssh: Ssh | None,
    min_seconds: float,
    progress: Progress,
) -> tuple[Latency, Memory, Energy]:
    if ssh is not None:
        remote = measure_remote(
            file,
            images,
            ssh=ssh,
            batch_sizes=sizes,
            num_threads=_counts(threads),
            min_seconds=min_seconds,
        )
        return remote.latency, remote.memory, remote.energy
    latency = measure_latency(
        file,
        images,
        batch_sizes=sizes,
        num_threads=threads,
        min_seconds=min_seconds,
        progress=progress,
    )
    first = latency.measurements[0]
    size, count = first.batch_size, first.num_threads
    memory = measure_memory(file, images, batch_size=size, num_threads=count)
    energy = measure_energy(file, images, batch_size=size, num_threads=count)
    return latency, memory, energy


def _counts(threads: Sequence[int | Literal["all"]]) -> list[int]:
    counts = [count for count in threads if count != "all"]
    if len(counts) < len(threads):
        raise InputError(
            problem(
                "all threads of another machine are asked for",
                expected="a number of threads",
                mend="Give the number.",
            )
        )
    return counts


def _estimated(energy: Energy, latency: Latency, device: Device | None) -> Energy:
    """Return the energy, estimated from the device's power where no counter told it."""
    if energy.method != "not measured" or device is None or device.power is None:
        return energy
    row = latency.measurements[0]
    return estimate_energy(
        watts=device.power.watts,
        source=device.power.source,
        milliseconds=row.p50_ms,
        num_images=row.batch_size,
    )


def _emulated(
    file: RuntimeFile, images: ArrayLike, device: Device
) -> tuple[dict[str, Any], list[str]]:
    """Return what C code takes on the device's core, and why that is not known."""
    if device.cpu is None:
        return {}, []
    if file.runtime == "tflm":
        return {}, ["flash is known of C code only; the RAM is the arena"]
    if file.runtime != "c":
        return {}, [f"flash and RAM are known of C code only, and {file.path.name} is none"]
    from understudy.evaluate.microcontroller import measure_microcontroller
    from understudy.export.target import Artifact

    names = tuple(path.name for path in file.files)
    some_NCHW = np.asarray(images)[:NUM_EMULATED_IMAGES]
    facts = {"input_bytes": 4 * some_NCHW[0].size}
    artifact = Artifact("c", device.precision, file.path.parent, names, facts=facts)
    try:
        cost = measure_microcontroller(artifact, some_NCHW, cpu=device.cpu)
    except InputError as error:  # missing tools, or code that does not fit on the board
        return {}, [f"{device.cpu}: not measured: {'; '.join(error.problems)}"]
    return cost.to_json(), [f"flash, RAM and instructions are counted in {cost.emulator}"]


def _judged(
    profile: ArtifactProfile,
    file: RuntimeFile,
    device: Device,
    chip: dict[str, Any],
    notes: list[str],
    *,
    is_there: bool,
) -> ArtifactProfile:
    energy, estimates = profile.energy, {}
    if energy.method == "estimate":
        estimates["energy_mj"] = str(energy)
    expected = estimate_time(device, round(chip["instructions_per_image"])) if chip else None
    if expected is not None:
        estimates["latency_ms"] = f"about {expected.milliseconds:.4g} ms, {expected.source}"
    ram_names = ("ram_bytes", "input_bytes", "peak_stack_bytes")
    size_bytes, counted = profile.size_bytes, {}
    if file.runtime == "c":
        size_bytes, counted["model_size_bytes"] = c_model_size(
            chip,
            compiled=compiled_bytes(file.path.parent),
            weight_bytes=profile.latency.facts["weight_bytes"],
        )
    facts = BudgetFacts(
        model_size_bytes=size_bytes,
        measurements=[row.to_json() for row in profile.latency.measurements],
        peak_memory_bytes=profile.memory.peak_memory_bytes,
        flash_bytes=chip.get("flash_bytes"),
        ram_bytes=sum(chip[name] for name in ram_names) if chip else profile.arena_bytes,
        energy_mj=energy.energy_mj if energy.method == "counter" else None,
        estimates=estimates,
        counted=counted,
    )
    if not is_there:
        notes = [
            *notes,
            f"times, memory and energy are of this machine, not of: {device.title}; "
            "measure there with --host",
        ]
    if profile.runtime != device.runtime:
        notes = [*notes, f"this device's runtime is {device.runtime}, not {profile.runtime}"]
    rows = check_budget(
        device_limits(device), facts=facts_for(device, facts, is_on_device=is_there)
    )
    return replace(profile, device=device.title, budget=tuple(rows), notes=tuple(notes))
