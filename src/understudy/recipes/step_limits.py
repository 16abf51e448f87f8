"""Limits that only a target's files can be asked for, held against every state of compression.

A step's ONNX file says nothing of the flash that C code takes, or of the size of a `.tflite` file.
So what would ship if compression ended with a state is made, asked what can be told of it here
without the test split, and thrown away. It is a stage beside the step: another device asks the
files again and trains nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from understudy.artifacts import Record
from understudy.evaluate.budget import BUDGET_UNITS, BudgetFacts, check_budget
from understudy.evaluate.c_size import compiled_bytes
from understudy.evaluate.latency import measure_latency
from understudy.evaluate.memory import measure_memory
from understudy.evaluate.microcontroller import measure_microcontroller
from understudy.export.target import Artifact, ExportSource, find_target
from understudy.models.cost import model_cost
from understudy.progress import log
from understudy.recipes.artifact_budget import artifact_budget
from understudy.recipes.artifact_energy import device_of
from understudy.recipes.artifacts import (
    INT8_SECTION,
    artifact_wanted,
    failure_of,
    release_budget,
)
from understudy.recipes.compressed import KIND, Network, export_source
from understudy.recipes.gates import GateRow, check_budget_kept
from understudy.recipes.microcontrollers import CPUS
from understudy.recipes.run import Run

# Of a microcontroller, and no other file is asked for them.
CHIP_LIMITS = ("flash_bytes", "ram_bytes")


@dataclass(frozen=True)
class LimitsVerdict:
    """What the limits on shipped files say of one step.

    Attributes:
        records: of the two states that were compared; none where there was nothing to compare.
        rows: the limits that were kept before.
        later: the limits that could not be told of the state, with their targets.
    """

    records: tuple[Record, ...] = ()
    rows: tuple[GateRow, ...] = ()
    later: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the rows and what is left to the release, as plain values."""
        return {"gates": [asdict(row) for row in self.rows], "later": list(self.later)}


@dataclass(frozen=True)
class Counted:
    """A state of the student by the number of the step that made it; 0: as it was trained."""

    number: int
    record: Record
    network: Network = field(default_factory=Network)


def asked_limits(run: Run) -> list[str]:
    """Return the limits that shipped files are asked for after every step; mostly none.

    With a device all of the release's, without one those of a microcontroller. What a step's ONNX
    file is asked for anyway, and training time, are not among them.
    """
    own, limits = run.recipe.budget, release_budget(run)
    if run.recipe.release.device is None:
        return [name for name in CHIP_LIMITS if getattr(limits, name) is not None]
    known = {"train_hours", *(name for name in ("num_params", "macs") if getattr(own, name))}
    return [
        name for name in BUDGET_UNITS if name not in known and getattr(limits, name) is not None
    ]


def judge_limits(
    run: Run, before: Counted, after: Counted, known: dict[int, Record]
) -> LimitsVerdict:
    """Return whether a step broke a limit on shipped files that was kept before it.

    Args:
        known: by number, the records of states that were asked already; more are added.
    """
    if not asked_limits(run):
        return LimitsVerdict()
    for state in (before, after):
        if state.number not in known:
            known[state.number] = state_limits(run, state)
    records = (known[before.number], known[after.number])
    old, new = (record.timing["rows"] for record in records)
    # What cannot be told takes nothing back: the release judges it, a strict budget included.
    told = [row for row in new if row["measured"] is not None]
    later = tuple(
        row["name"] + (f" ({row['why']})" if row["why"] else "")
        for row in new
        if row["measured"] is None
    )
    return LimitsVerdict(records, tuple(check_budget_kept(old, told)), later)


def state_limits(run: Run, state: Counted) -> Record:
    """Return the record of what a state's files are, made now unless it was finished.

    Where a file could not be made or measured, that is tried again: its tools may be here by now.
    """
    device, targets = device_of(run), run.recipe.release.targets
    section = run.recipe.section("export", "measurement") | {
        "targets": list(targets),
        "limits": release_budget(run).model_dump(mode="json"),
        "device": None if device is None else device.model_dump(mode="json"),
    }
    if any(artifact_wanted(text, state.network)[1] == "int8" for text in targets):
        section |= INT8_SECTION
    stage = run.begin(
        f"{KIND}-{state.number}-limits",
        section=section,
        parents={state.record.kind: state.record.hash},
        holds=lambda record: not any(row["why"] for row in record.timing["rows"]),
    )
    if stage.record is not None:
        return stage.record
    source = export_source(run, state.network, recipe_hash=state.record.key)
    rows = [row for text in targets for row in target_rows(run, source, text, state.network)]
    # What was measured is no part of what was made.
    return stage.finish({"network": state.network.to_json()}, timing={"rows": rows})


def target_rows(
    run: Run, source: ExportSource, text: str, network: Network
) -> list[dict[str, Any]]:
    """Return one row a limit for what a target of the recipe would ship of a state.

    Args:
        text: the target as the recipe names it, which is part of the rows' names.
    """
    name, precision = artifact_wanted(text, network)
    asked, why = asked_limits(run), Reasons(text)
    rows = check_budget(release_budget(run), facts=BudgetFacts())
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        with why.noted("not made", *asked):
            artifact = find_target(name).export(source, Path(folder), precision=precision)
        if not why.found:
            timing = quick_facts(run, artifact, why)
            rows = artifact_budget(run, shipped_record(source, artifact, timing))
    return [
        {
            **row.to_json(),
            "name": f"{row.name} of {text}",
            "why": why.found.get(row.name, "") if row.measured is None else "",
        }
        for row in rows
        if row.name in asked
    ]


@dataclass
class Reasons:
    """Why limits of a target could not be told, by limit."""

    target: str
    found: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def noted(self, what: str, *limits: str) -> Iterator[None]:
        """Note for these limits what goes wrong inside, and let the others be told.

        Raises:
            OSError: the disk is full, which is no fault of the target.
        """
        try:
            yield
        except Exception as error:  # a target's own tools raise many kinds
            reason = f"{what}: {failure_of(error)}"
            log.warning("%s of this state was %s", self.target, reason)
            self.found |= dict.fromkeys(limits, reason)


def shipped_record(source: ExportSource, artifact: Artifact, timing: dict[str, Any]) -> Record:
    """Return what the budget reads of a shipped artifact, as far as it is told here and now."""
    cost = model_cost(source.model, source.image_shape)
    payload = {**artifact.to_json(), "num_params": cost.num_params, "macs": cost.macs}
    return Record(kind="", key="", seed=0, payload=payload, timing=timing)


def quick_facts(run: Run, artifact: Artifact, why: Reasons) -> dict[str, Any]:
    """Return what limits ask of time, memory and a microcontroller, on validation pictures.

    Of a device that is not this machine no time or memory; of files that take one picture at a time
    no batch. A release says what becomes of those limits, and of those whose measurement fails.
    """
    device, budget = device_of(run), release_budget(run)
    images_NCHW = run.source.images(run.splits.validation[:100]).numpy()
    timing: dict[str, Any] = {}
    limit = budget.latency_ms
    runs_here = find_target(artifact.target).RUNS_HERE and artifact.target != "tflm"
    if device is not None and device.is_this_machine and runs_here:
        if limit is not None and (artifact.batch == "any" or limit.batch == 1):
            with why.noted("not measured", "latency_ms"):
                latency = measure_latency(
                    artifact,
                    images_NCHW,
                    batch_sizes=(limit.batch,),
                    num_threads=(limit.threads,),
                    min_seconds=run.recipe.measurement.min_seconds,
                )
                timing["latency"] = latency.to_json()
        if budget.peak_memory_bytes is not None:
            with why.noted("not measured", "peak_memory_bytes"):
                timing["memory"] = measure_memory(artifact, images_NCHW).to_json()
    if artifact.target == "c":
        timing["compiled_bytes"] = compiled_bytes(artifact.folder)
        cpu: Any = CPUS[0] if device is None or device.cpu is None else device.cpu
        with why.noted("not measured", *CHIP_LIMITS):  # tools are missing, or it is too large
            chip = measure_microcontroller(artifact, images_NCHW[:1], cpu=cpu)
            timing["microcontrollers"] = {cpu: chip.to_json()}
    return timing
