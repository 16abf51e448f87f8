"""Whether every set of files that ships keeps the budget, of the recipe and of its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from understudy.artifacts import RECORD_NAME, Record
from understudy.evaluate.budget import BudgetFacts, BudgetRow, check_budget
from understudy.evaluate.c_size import c_model_size
from understudy.evaluate.devices import Device, estimate_time, facts_for
from understudy.recipes.artifact_energy import device_of
from understudy.recipes.artifacts import artifact_kind, release_budget, wanted_artifacts
from understudy.recipes.chain import earlier_seconds
from understudy.recipes.compressed import KIND, current_compression, last_network
from understudy.recipes.run import Run


def artifact_budgets(run: Run) -> dict[str, list[BudgetRow]]:
    """Return the budget's rows of every artifact that belongs to the run as it is, by stage."""
    compressed = current_compression(run)
    if compressed is None:
        return {}
    kinds = [artifact_kind(*found) for found in wanted_artifacts(run, last_network(compressed))]
    records = [
        Record.load(run.folder / kind)
        for kind in kinds
        if (run.folder / kind / RECORD_NAME).exists()
    ]
    return {
        record.kind: artifact_budget(run, record)
        for record in records
        if record.parents.get(KIND) == compressed.hash
    }


def shipped_budget(run: Run) -> dict[str, dict[str, Any]]:
    """Return for each limit the row of the artifact that comes closest to missing it, or does.

    A limit that no artifact was measured for is not measured, whatever the file of training took;
    before a release there is none.
    """
    worst: dict[str, tuple[tuple[bool, bool, float], dict[str, Any]]] = {}
    for kind, rows in artifact_budgets(run).items():
        for row in rows:
            rank = (row.status == "failed", row.measured is not None, row.measured or 0.0)
            if row.name not in worst or rank >= worst[row.name][0]:
                detail = f"{row.detail}, {kind.removeprefix('artifact-')}"
                worst[row.name] = (rank, {**row.to_json(), "detail": detail})
    return {name: values for name, (_, values) in worst.items()}


def artifact_budget(run: Run, record: Record) -> list[BudgetRow]:
    """Return the rows of the budget for one artifact."""
    device, payload, timing = device_of(run), record.payload, record.timing
    chip = chip_facts(timing, device)
    energy = timing.get("energy") or {}
    size_bytes, counted = model_size(record, chip)
    seconds = run.parent("student", "train").timing["train_seconds"] + earlier_seconds(run)
    facts = BudgetFacts(
        num_params=payload["num_params"],
        macs=payload.get("macs"),  # records that were made earlier are without it
        model_size_bytes=size_bytes,
        measurements=rows_of_latency(timing),
        peak_memory_bytes=timing.get("memory", {}).get("peak_memory_bytes"),
        train_hours=seconds / 3600,
        flash_bytes=chip.get("flash_bytes"),
        ram_bytes=ram_of(chip, payload["facts"]),
        energy_mj=energy.get("energy_mj") if energy.get("method") == "counter" else None,
        estimates=estimates_of(timing, chip, device),
        counted={"model_size_bytes": counted} if counted else {},
    )
    if device is not None:
        facts = facts_for(device, facts, is_on_device=False)
    return check_budget(release_budget(run), facts=facts)


def model_size(record: Record, chip: Mapping[str, Any]) -> tuple[int, str]:
    """Return the bytes that reach the device, and what is counted where that is not the files."""
    payload = record.payload
    if payload["target"] == "web":
        return payload["size_bytes"], "page, network and runtime"
    if payload["target"] != "c":
        return payload["size_bytes"], ""
    return c_model_size(
        chip,
        compiled=record.timing.get("compiled_bytes"),
        weight_bytes=payload["facts"]["weight_bytes"],
    )


def rows_of_latency(timing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the measured times of an artifact, those of a page as one picture on one thread."""
    if "browser" in timing:
        found = timing["browser"]
        return [{"batch_size": 1, "num_threads": 1, **found}]
    rows: list[dict[str, Any]] = timing.get("latency", {}).get("measurements", [])
    return rows


def chip_facts(timing: Mapping[str, Any], device: Device | None) -> dict[str, Any]:
    """Return flash, RAM and instructions of the microcontroller that the release is for."""
    chips: dict[str, dict[str, Any]] = timing.get("microcontrollers", {})
    if not chips:
        return {}
    if device is not None and device.cpu is not None:
        return chips.get(device.cpu, {})
    return next(iter(chips.values()))


def ram_of(chip: Mapping[str, Any], facts: Mapping[str, Any]) -> int | None:
    """Return static memory, pixels and stack of C code, or the arena of an interpreter."""
    if chip:
        return sum(int(chip[name]) for name in ("ram_bytes", "input_bytes", "peak_stack_bytes"))
    arena: int | None = facts.get("arena_bytes")
    return arena


def estimates_of(
    timing: Mapping[str, Any], chip: Mapping[str, Any], device: Device | None
) -> dict[str, str]:
    """Return in a sentence what is expected of the time where it was not measured.

    It is what a device's clock makes of a count of instructions or, of this machine, so many
    single pictures.
    """
    expected = timing.get("expected_ms")
    if expected and (device is None or device.is_this_machine):
        return {"latency_ms": expected}
    if device is None or not chip:
        return {}
    found = estimate_time(device, round(chip["instructions_per_image"]))
    return {} if found is None else {"latency_ms": f"{found.milliseconds:.3g} ms, {found.source}"}
