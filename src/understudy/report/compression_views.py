"""Compression and shipped files in the report: their tables, on the page and in the terminal."""

from __future__ import annotations

from typing import Any

from understudy.report import formats
from understudy.report.compression_judges import missed_limits
from understudy.report.compression_results import (
    ArtifactFacts,
    FailedTarget,
    PrunedSpeed,
    StepFacts,
)
from understudy.report.results import RunResults
from understudy.report.summary import aligned

NOTHING = "\u2014"
STEP_COLUMNS = (
    "Step",
    "Kept",
    "Accuracy",
    "Change",
    "Parameters",
    "Multiply-adds",
    "ONNX file",
    "Times as fast",
    "Took",
)
ARTIFACT_COLUMNS = (
    "Files",
    "Accuracy, test",
    "Against float",
    "Same answer",
    "Largest difference",
    "Mean difference",
    "Size",
    "One picture",
    "95 of 100 within",
    "Loading",
    "Peak memory",
    "Budget",
)


def compression_context(results: RunResults) -> dict[str, Any]:
    """Return what the templates show of compression; empty tables where there was none."""
    facts = results.compression
    return {
        "step_columns": STEP_COLUMNS,
        "step_rows": [] if facts is None else [step_row(step) for step in facts.steps],
        "step_notes": []
        if facts is None
        else [
            *(note for s in facts.steps for note in step_notes(s)),
            *map(pruned_note, facts.pruned),
        ],
        "artifact_columns": ARTIFACT_COLUMNS,
        "artifact_rows": []
        if facts is None
        else [*map(artifact_row, facts.artifacts), *map(failed_row, facts.failed)],
        "failed_notes": []
        if facts is None
        else [f"{found.name} was not made: {found.reason}" for found in facts.failed],
        "artifact_notes": []
        if facts is None
        else [note for a in facts.artifacts for note in artifact_notes(a)],
        "missed_limits": missed_limits(results),
    }


def step_row(step: StepFacts) -> tuple[str, ...]:
    """Return one row of text for ``STEP_COLUMNS``."""
    speedup = NOTHING
    if step.speedup is not None:
        speedup = f"{step.speedup:.2f}"
        if step.speedup_quartiles is not None:
            low, high = step.speedup_quartiles
            speedup += f" ({low:.2f} to {high:.2f})"
    return (
        step.name,
        "yes" if step.kept else "taken back",
        formats.percent(step.accuracy),
        formats.points(step.accuracy - step.accuracy_before),
        formats.count(step.num_params),
        formats.large_count(step.macs),
        formats.size(step.file_bytes),
        speedup,
        formats.duration(step.seconds),
    )


def step_notes(step: StepFacts) -> list[str]:
    """Return what a step's row cannot hold."""
    notes = []
    if not step.kept:
        notes.append(f"{step.name} was taken back: {step.reason}.")
    if step.float_layers:
        notes.append(f"{step.name} leaves in float: {', '.join(step.float_layers)}.")
    if step.kept and step.judged_later:
        notes.append(f"{step.name}: judged at the release: {', '.join(step.judged_later)}.")
    return notes


def pruned_note(speed: PrunedSpeed) -> str:
    """Return what pruning is worth in one runtime, as a sentence."""
    start = f"Pruned, one picture in {speed.name}:"
    if speed.speedup is None or speed.quartiles is None:
        return f"{start} not measured: {speed.reason}."
    low, high = speed.quartiles
    return (
        f"{start} {speed.speedup:.2f} times as fast (quartiles {low:.2f} to {high:.2f} of "
        f"{speed.num_rounds} rounds), {formats.milliseconds(speed.before_ms)} before and "
        f"{formats.milliseconds(speed.after_ms)} after."
    )


def artifact_row(artifact: ArtifactFacts) -> tuple[str, ...]:
    """Return one row of text for ``ARTIFACT_COLUMNS``."""
    change, largest = artifact.accuracy_change, artifact.max_abs_difference
    mean = artifact.mean_abs_difference
    return (
        artifact.name,
        NOTHING if artifact.accuracy is None else formats.percent(artifact.accuracy),
        NOTHING if change is None else formats.points(change),
        NOTHING if artifact.agreement is None else formats.percent(artifact.agreement),
        NOTHING if largest is None else formats.significant(largest),
        NOTHING if mean is None else formats.significant(mean),
        formats.size(artifact.size_bytes),
        formats.milliseconds(artifact.p50_ms),
        formats.milliseconds(artifact.p95_ms),
        formats.milliseconds(artifact.load_ms),
        formats.size(artifact.peak_memory_bytes),
        budget_word(artifact),
    )


def failed_row(failed: FailedTarget) -> tuple[str, ...]:
    """Return the row of a target that failed."""
    return (failed.name, "not made", *[NOTHING] * (len(ARTIFACT_COLUMNS) - 2))


def artifact_notes(artifact: ArtifactFacts) -> list[str]:
    """Return facts and notes that the row cannot hold, as sentences."""
    facts = [
        f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{key} {value}"
        for key, value in artifact.facts.items()
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    ]
    energy = artifact.energy
    if energy is not None:
        value = energy.get("energy_mj")
        told = "not measured" if value is None else f"{value:.3g} mJ"
        facts.append(f"energy a picture {told} ({energy.get('method', 'not measured')})")
    notes = [f"{artifact.name}: {'; '.join(facts)}."] if facts else []
    return notes + [f"{artifact.name}: {note}" for note in artifact.notes]


def budget_word(artifact: ArtifactFacts) -> str:
    """Return in a word whether the artifact keeps the budget."""
    statuses = {line.status for line in artifact.budget}
    if "failed" in statuses:
        return "missed"
    if "not_measured" in statuses:
        return "not all measured"
    return "kept" if statuses else "none"


def compression_text(results: RunResults) -> str:
    """Return steps, artifacts and limits that are not kept, for the terminal; "" without any."""
    facts = results.compression
    if facts is None:
        return ""
    context = compression_context(results)
    tables = [
        [STEP_COLUMNS, *context["step_rows"]],
        [ARTIFACT_COLUMNS, *context["artifact_rows"]],
        [("Not kept", "Limit", "At most", "Measured", "Margin"), *context["missed_limits"]],
    ]
    parts = ["\n".join(aligned(rows)) for rows in tables if len(rows) > 1]
    kinds = ("step_notes", "failed_notes", "artifact_notes")
    notes = "\n".join(note for kind in kinds for note in context[kind])
    return formats.plain("\n\n".join([*parts, *([notes] if notes else [])]))
