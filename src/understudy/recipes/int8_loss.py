"""What int8 takes from a student: the float state that it was made from, on the same pictures.

Runtimes with int8 tools of their own make other files than the step that the gates looked at, so
every int8 file is held to the gate on accuracy by its own answers.
"""

from __future__ import annotations

from understudy.artifacts import Record
from understudy.evaluate.accuracy import predict_logits
from understudy.recipes.compressed import (
    Network,
    calibration_images,
    last_network,
    load_network,
    steps_of,
)
from understudy.recipes.run import Run


def float_state(run: Run, compressed: Record) -> Record:
    """Return the record of the last state of the student before int8: a step's, or the training's.

    It is what went into the step that quantises, whether that step was kept or not.
    """
    kept = [record for record in steps_of(run, compressed) if record.payload["kept"]]
    in_float = [record for record in kept if not makes_int8(record)]
    return in_float[-1] if in_float else run.parent("student", "train")


def float_accuracy(run: Run, state: Record) -> float:
    """Return the share of test pictures that a float state answers rightly, in PyTorch."""
    if state.kind == "student":
        evaluation = run.parent("evaluation", "evaluate").payload
        known: float = evaluation["metrics"]["student"]["test"]["accuracy"]
        return known
    model = load_network(run, Network.from_json(state.payload["network"]))
    logits_NK = predict_logits(model, run.source, run.splits.test)
    labels_N = run.source.labels_N[run.splits.test]
    return (logits_NK.argmax(1) == labels_N).double().mean().item()


def quantised_afterwards(run: Run, compressed: Record, target: str) -> str:
    """Return in a sentence why int8 files are made of a float state; "" where they are not."""
    if last_network(compressed).precision == "int8":
        return ""
    taken_back = [record.payload for record in steps_of(run, compressed) if makes_int8(record)]
    reason = "the recipe has no step that quantizes"
    if taken_back:
        reason = f"{taken_back[-1]['name']} was taken back ({taken_back[-1]['reason']})"
    how = f" with {len(calibration_images(run))} calibration pictures"
    if target == "coreml":
        how = ", the weights alone"  # whose rounding needs no pictures
    return f"Quantised after training{how}, because {reason}."


def most_int8_may_lose(run: Run) -> float | None:
    """Return the gate on accuracy of the step that quantises, or of the section without one."""
    section = run.recipe.compression
    own = section.steps[-1].gates if section.quantizes else None
    return (own or section.gates).accuracy_drop


def makes_int8(record: Record) -> bool:
    """Return whether a step is the one that quantises."""
    is_int8: bool = record.payload["network"]["precision"] == "int8"
    return is_int8
