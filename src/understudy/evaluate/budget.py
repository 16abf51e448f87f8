"""The budget: limits a student must keep, and whether measured facts keep them.

Importable without torch, because recipes are validated before anything heavy is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from understudy.settings import MAX_THREADS, Section

Status = Literal["passed", "failed", "not_measured"]

# Limit name to unit, in the order in which rows are shown.
BUDGET_UNITS = {
    "num_params": "parameters",
    "macs": "multiply-adds",
    "model_size_bytes": "bytes",
    "latency_ms": "ms",
    "peak_memory_bytes": "bytes",
    "train_hours": "h",
    "flash_bytes": "bytes",
    "ram_bytes": "bytes",
    "energy_mj": "mJ",
}


class LatencyLimit(Section):
    """A limit on the time that the exported file takes for one batch."""

    batch: Annotated[int, Field(gt=0, description="Pictures a batch.")] = 1
    threads: Annotated[int, Field(gt=0, le=MAX_THREADS, description="Threads of the runtime.")] = 1
    percentile: Annotated[Literal[50, 95, 99], Field(description="Of the runs, nearest rank.")] = 95
    at_most: Annotated[float, Field(gt=0, description="Milliseconds a batch.")]


class Budget(Section):
    """Limits the student must keep. What is not given is not checked."""

    num_params: Annotated[int | None, Field(gt=0)] = None
    macs: Annotated[int | None, Field(gt=0, description="Multiply-adds of one picture.")] = None
    model_size_bytes: Annotated[
        int | None, Field(gt=0, description="Size of the exported file.")
    ] = None
    latency_ms: LatencyLimit | None = None
    peak_memory_bytes: Annotated[
        int | None,
        Field(gt=0, description="Resident memory of a fresh process that runs the file."),
    ] = None
    train_hours: Annotated[
        float | None, Field(gt=0, description="Wall time of the student's training.")
    ] = None
    flash_bytes: Annotated[
        int | None,
        Field(gt=0, description="Code and weights in a microcontroller's flash memory."),
    ] = None
    ram_bytes: Annotated[
        int | None,
        Field(gt=0, description="Static memory and stack, or arena, of a microcontroller."),
    ] = None
    energy_mj: Annotated[
        float | None,
        Field(gt=0, description="Millijoules a picture, above idle. An estimate proves nothing."),
    ] = None
    strict: Annotated[bool, Field(description="A limit that was not measured fails.")] = False


@dataclass(frozen=True)
class BudgetFacts:
    """What was measured of the student; None (or no row) where it was not.

    Attributes:
        num_params: parameters of the student.
        model_size_bytes: size of the exported file.
        measurements: latency rows with ``batch_size``, ``num_threads``, ``p50_ms``, ``p95_ms`` and
            ``p99_ms``, as ``Measurement.to_json`` writes them.
        peak_memory_bytes: peak resident memory of the exported file in its runtime.
        train_hours: wall time of the student's training.
        macs: multiply-adds of one picture, as ``model_cost`` counts them.
        flash_bytes, ram_bytes: of the file built for a microcontroller.
        energy_mj: read from counters; an estimate belongs into ``estimates``.
        estimates: name of a limit to a sentence on what is expected. It is shown and decides
            nothing: the limit is not measured.
        counted: name of a limit to what its figure counts, where that is not plain.
    """

    num_params: int | None = None
    model_size_bytes: int | None = None
    measurements: Sequence[Mapping[str, Any]] = ()
    peak_memory_bytes: int | None = None
    train_hours: float | None = None
    macs: int | None = None
    flash_bytes: int | None = None
    ram_bytes: int | None = None
    energy_mj: float | None = None
    estimates: Mapping[str, str] = field(default_factory=dict)
    counted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BudgetRow:
    """One limit against what was measured. ``measured`` is None exactly if it was not measured."""

    name: str
    limit: float
    measured: float | None
    unit: str
    status: Status
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Return the row as a plain dict."""
        return asdict(self)


def check_budget(
    budget: Budget, *, facts: BudgetFacts, strict: bool | None = None
) -> list[BudgetRow]:
    """Return one row for each limit that is set, in a fixed order.

    A measured value at the limit passes. What was not measured, or is not a finite number, is
    ``not_measured``, which is not passed.

    Args:
        strict: what was not measured is ``failed`` instead; None: as the budget says.
    """
    is_strict = budget.strict if strict is None else strict
    rows = []
    for name in BUDGET_UNITS:
        limit = getattr(budget, name)
        if limit is None:
            continue
        if isinstance(limit, LatencyLimit):
            rows.append(_latency_row(limit, facts))
        else:
            setting = facts.counted.get(name, "")
            rows.append(_row(name, limit, getattr(facts, name), setting=setting))
    return [_unmeasured(row, facts, is_strict) if row.measured is None else row for row in rows]


def _unmeasured(row: BudgetRow, facts: BudgetFacts, is_strict: bool) -> BudgetRow:
    detail = row.detail
    if row.name in facts.estimates:
        detail += f" (estimate: {facts.estimates[row.name]})"
    if is_strict:
        return replace(row, status="failed", detail=f"{detail}, and the budget is strict")
    return replace(row, detail=detail)


def _latency_row(limit: LatencyLimit, facts: BudgetFacts) -> BudgetRow:
    percentile = f"p{limit.percentile}"
    measured = next(
        (
            row.get(f"{percentile}_ms")
            for row in facts.measurements
            if row["batch_size"] == limit.batch and row["num_threads"] == limit.threads
        ),
        None,
    )
    setting = f"{percentile} at batch {limit.batch}, threads {limit.threads}"
    return _row("latency_ms", limit.at_most, measured, setting=setting)


def _row(name: str, limit: float, measured: float | None, *, setting: str) -> BudgetRow:
    status: Status
    if measured is None or not math.isfinite(measured):
        measured, status, detail = None, "not_measured", "not measured"
    elif measured <= limit:
        status, detail = "passed", f"{measured / limit:.1%} of the limit"
    else:
        status, detail = "failed", f"{measured / limit - 1:.1%} over the limit"
    return BudgetRow(
        name=name,
        limit=limit,
        measured=measured,
        unit=BUDGET_UNITS[name],
        status=status,
        detail=f"{setting}: {detail}" if setting else detail,
    )
