"""What the coded checks look at in compression and shipped files."""

from __future__ import annotations

from understudy.report import formats
from understudy.report.compression_results import StepFacts
from understudy.report.judges import Finding
from understudy.report.results import RunResults

NOTHING = "\u2014"


def missed_limits(results: RunResults) -> list[tuple[str, ...]]:
    """Return limit, measured and margin of everything that is not kept, one row a limit."""
    if results.compression is None:
        return []
    return [
        (
            artifact.name,
            line.name,
            formats.quantity(line.limit, line.unit),
            "not measured" if line.measured is None else formats.quantity(line.measured, line.unit),
            NOTHING
            if line.measured is None
            else f"{100 * (line.limit - line.measured) / line.limit:+.1f} %",
        )
        for artifact in results.compression.artifacts
        for line in artifact.budget
        if line.status != "passed"
    ]


def steps_are_kept(results: RunResults) -> Finding:
    """US016: was no step of compression taken back?"""
    if results.compression is None or not results.compression.steps:
        return "not_applicable", "The student was not compressed."
    lost = [f"{s.name} ({s.reason})" for s in results.compression.steps if not s.kept]
    if lost:
        return "issue", f"Taken back: {'; '.join(lost)}."
    return "passed", f"All {len(results.compression.steps)} steps kept their gates."


def pruned_is_faster(results: RunResults) -> Finding:
    """US017: is what was pruned faster in the runtimes that it is released for?"""
    facts = results.compression
    pruned = [] if facts is None else [s for s in facts.steps if _is_pruned(s)]
    if facts is None or not pruned:
        return "not_applicable", "Nothing was pruned."
    # Earlier results know of the step alone, in ONNX Runtime.
    told = [(speed.name, speed.speedup, speed.quartiles, speed.reason) for speed in facts.pruned]
    told = told or [(s.name, s.speedup, s.speedup_quartiles, "") for s in pruned]
    slow: list[str] = []
    fast: list[str] = []
    unknown: list[str] = []
    for name, speedup, quartiles, reason in told:
        if speedup is None or quartiles is None:
            unknown.append(f"{name} ({reason})" if reason else name)
        else:
            (fast if quartiles[0] > 1 else slow).append(f"{name} {speedup:.2f} times")
    also = [f"{', '.join(fast)} as fast"] if fast else []
    also += [f"not measured: {', '.join(unknown)}"] if unknown else []
    if slow:
        begin = f"Fewer multiply-adds are not less time here: {', '.join(slow)} as fast as before"
        return "issue", "; ".join([begin, *also]) + "."
    if unknown:
        return "skipped", f"Not timed against the unpruned student everywhere: {'; '.join(also)}."
    return "passed", f"Pruning is worth it: {', '.join(fast)} as fast as before."


def _is_pruned(step: StepFacts) -> bool:
    return step.kept and step.name.startswith("prune")


def artifacts_keep_the_budget(results: RunResults) -> Finding:
    """US018: does every file that ships keep the budget, and is it measured?"""
    artifacts = () if results.compression is None else results.compression.artifacts
    if not artifacts:
        return "not_applicable", "Nothing was released."
    missed = missed_limits(results)
    if missed:
        told = "; ".join(
            f"{name}: {limit} {measured}, limit {most}" for name, limit, most, measured, _ in missed
        )
        return "issue", f"Not kept: {told}."
    if not any(artifact.budget for artifact in artifacts):
        return "not_applicable", "No budget was given."
    return "passed", f"All {len(artifacts)} artifacts keep every limit, as measured."


def artifacts_ran(results: RunResults) -> Finding:
    """US019: was every file that was asked for made, and run here?"""
    artifacts = () if results.compression is None else results.compression.artifacts
    if results.compression is not None and results.compression.failed:
        told = "; ".join(
            f"{found.name} ({found.reason.rstrip('.')})" for found in results.compression.failed
        )
        return "issue", f"Not made: {told}."
    if not artifacts:
        return "not_applicable", "Nothing was released."
    not_run = [artifact.name for artifact in artifacts if artifact.accuracy is None]
    if not_run:
        return "tip", f"Not run here, so not proved: {', '.join(not_run)}."
    return "passed", f"All {len(artifacts)} artifacts answered the whole test split."


def int8_keeps_its_accuracy(results: RunResults) -> Finding:
    """US020: does every int8 file lose no more accuracy than a step of compression may?"""
    facts = results.compression
    int8 = [] if facts is None else [a for a in facts.artifacts if a.precision == "int8"]
    if facts is None or not int8:
        return "not_applicable", "No int8 file was released."
    if facts.max_int8_loss is None:
        return "not_applicable", "The recipe sets no gate on accuracy."
    changes = {a.name: a.accuracy_change for a in int8 if a.accuracy_change is not None}
    if not changes:
        return "skipped", "No int8 file was run here."
    most = facts.max_int8_loss
    told = {name: f"{name} {formats.points(change)}" for name, change in changes.items()}
    # Accuracies are shares of a count: 0.9 - 0.89 is not to fail a limit of 0.01.
    lost = [told[name] for name, change in changes.items() if -change > most + 1e-9]
    against = f"against the float student on the same pictures, where {formats.points(-most)}"
    if lost:
        return "issue", f"Lost by int8: {'; '.join(lost)} {against} are allowed."
    worst = told[min(changes, key=changes.__getitem__)]
    return "passed", f"The most that int8 changes is {worst} {against} are allowed."
