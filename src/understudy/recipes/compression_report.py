"""What the records of compression and release say, as values for the run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from understudy.artifacts import Record
from understudy.evaluate.budget import BudgetFacts, BudgetRow, check_budget
from understudy.recipes.artifacts import failed_artifacts
from understudy.recipes.compressed import current_compression, file_budget, steps_of
from understudy.recipes.int8_loss import most_int8_may_lose
from understudy.recipes.pruned_speed import pruned_speeds
from understudy.recipes.run import Run


def compression_values(
    run: Run, budget: Mapping[str, Sequence[BudgetRow]] | None = None
) -> dict[str, Any] | None:
    """Return steps and artifacts as the report's results hold them; None where there are none.

    Records that were made from an earlier student, or from a part of the recipe that has changed
    since, are left out.

    Args:
        budget: by stage, the rows of every artifact; None: no artifact is shown.
    """
    compressed = current_compression(run)
    if compressed is None:
        return None
    limits = compressed.timing.get("limits", {})
    failed = {} if budget is None else failed_artifacts(run, compressed)
    artifacts = [Record.load(run.folder / kind) for kind in budget or {}]
    return {
        "steps": [
            step_values(record, limits.get(record.kind, {})) for record in steps_of(run, compressed)
        ],
        "artifacts": [artifact_values(record, (budget or {})[record.kind]) for record in artifacts],
        "failed": [
            {"target": name, "precision": precision, "reason": reason}
            for (name, precision), reason in failed.items()
        ],
        "pruned": pruned_speeds(run, compressed),
        "device": run.recipe.release.device,
        "max_int8_loss": most_int8_may_lose(run),
    }


def current_steps(run: Run) -> list[Record] | None:
    """Return the steps that were made from the run's student and recipe as they are now."""
    compressed = current_compression(run)
    return None if compressed is None else steps_of(run, compressed)


def compressed_budget(run: Run) -> dict[str, dict[str, Any]]:
    """Return the budget's rows of the student as compression left it, by limit.

    What was measured then is held against the limits as they are now. Empty where no step was kept:
    then the student's own are what counts.
    """
    kept = [record for record in current_steps(run) or [] if record.payload["kept"]]
    if not kept:
        return {}
    is_strict = run.recipe.budget.strict
    rows = check_budget(file_budget(run), facts=facts_of_step(kept[-1]), strict=is_strict)
    return {
        row.name: {**row.to_json(), "detail": f"{row.detail}, after compression"} for row in rows
    }


def facts_of_step(step: Record) -> BudgetFacts:
    """Return what was measured of the ONNX file that a step made.

    Time and memory were measured only if the budget asked for them, a time as it did then.
    """
    payload, limit = step.payload, step.recipe["budget"]["latency_ms"]
    measured = {row["name"]: row["measured"] for row in step.timing["budget"]}
    measurements = []
    if limit is not None:
        setting = {"batch_size": limit["batch"], "num_threads": limit["threads"]}
        measurements = [{**setting, f"p{limit['percentile']}_ms": measured["latency_ms"]}]
    return BudgetFacts(
        num_params=payload["num_params"],
        macs=payload["macs"],
        model_size_bytes=payload["file_bytes"],
        measurements=measurements,
        peak_memory_bytes=measured.get("peak_memory_bytes"),
    )


def step_values(record: Record, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return one step as the report's results hold it.

    Args:
        limits: what the limits on shipped files said of it; empty where they were not asked.
    """
    payload, timing = record.payload, record.timing
    speed = timing["speed"]
    return {
        "name": payload["name"],
        "kept": payload["kept"],
        "reason": payload["reason"],
        "gates": [*payload["gates"], *timing["budget_gates"], *limits.get("gates", ())],
        "judged_later": limits.get("later", []),
        "accuracy_before": payload["accuracy_before"],
        "accuracy": payload["metrics"]["accuracy"],
        "num_params": payload["num_params"],
        "macs": payload["macs"],
        "file_bytes": payload["file_bytes"],
        "speedup": None if speed is None else speed["speedup"],
        "speedup_quartiles": None if speed is None else speed["quartiles"],
        "float_layers": payload["float_layers"],
        "seconds": timing["stage_seconds"],
    }


def artifact_values(record: Record, budget: Sequence[BudgetRow]) -> dict[str, Any]:
    """Return one artifact as the report's results hold it."""
    payload, timing = record.payload, record.timing
    parity, metrics = payload["parity"], payload["metrics"]
    single = single_picture(timing)
    return {
        "target": payload["target"],
        "precision": payload["precision"],
        "size_bytes": payload["size_bytes"],
        "accuracy": None if metrics is None else metrics["accuracy"],
        # Records of float32 files that were made earlier are without it.
        "float_accuracy": payload.get("float_accuracy"),
        "num_images": payload["num_images"],
        "agreement": None if parity is None else parity["top1_agreement"],
        "max_abs_difference": None if parity is None else parity["max_abs_difference"],
        "mean_abs_difference": None if parity is None else parity["mean_abs_difference"],
        "p50_ms": single.get("p50_ms"),
        "p95_ms": single.get("p95_ms"),
        "load_ms": single.get("load_ms"),
        "peak_memory_bytes": timing.get("memory", {}).get("peak_memory_bytes"),
        "energy": timing.get("energy"),
        "facts": plain_facts(payload["facts"]) | chips(timing) | counted(timing),
        "notes": payload["notes"],
        "budget": [row.to_json() for row in budget],
    }


def single_picture(timing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measured row of one picture with one thread; empty where there is none."""
    if "browser" in timing:
        return dict(timing["browser"])
    rows = timing.get("latency", {}).get("measurements", [])
    return next((r for r in rows if (r["batch_size"], r["num_threads"]) == (1, 1)), {})


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that are one figure or word each."""
    return {name: value for name, value in facts.items() if isinstance(value, int | float | str)}


def counted(timing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bytes of C code as compiled here and TFLM's instructions, where they are known."""
    found = timing.get("compiled_bytes")
    facts = {} if found is None else {"compiled_bytes": found}
    if (instructions := timing.get("instructions")) is not None:
        machine = instructions["machine"]
        facts[f"{machine} instructions_per_image"] = instructions["instructions_per_image"]
        facts[f"{machine} instructions counted by"] = instructions["counter"]
    return facts


def chips(timing: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured for each microcontroller, one flat name a figure."""
    return {
        f"{cpu} {name}": value
        for cpu, found in timing.get("microcontrollers", {}).items()
        for name, value in plain_facts(found).items()
    }
