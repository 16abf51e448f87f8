"""Making the student smaller, step by step; a step that loses more than its gates is taken back.

Every step is a stage of its own, made from the last state that was kept. After each one the same
evaluator looks at the validation split. The test split is not read here.
Limits that only the files of a target can be asked for are judged beside each step, in
``step_limits``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from understudy.artifacts import Record
from understudy.compress.quant_affine import DEPTHWISE_WEIGHT_MAX, WEIGHT_MAX
from understudy.compress.settings import Gates, PruneStep, QuantizeStep
from understudy.errors import InputError, MissingExtraError
from understudy.evaluate.accuracy import evaluate_logits
from understudy.evaluate.budget import BudgetFacts, check_budget
from understudy.evaluate.latency import measure_latency
from understudy.evaluate.memory import measure_memory
from understudy.export.target_names import DEFAULT_OPSET
from understudy.progress import log
from understudy.recipes.check import problems_of
from understudy.recipes.compressed import (
    KIND,
    MAX_CALIBRATION_IMAGES,
    MAX_FIRST_IMAGES,
    Network,
    file_budget,
)
from understudy.recipes.evaluate import LOGITS_NAME
from understudy.recipes.further_training import is_guided
from understudy.recipes.gates import GateRow, check_budget_kept, check_gates, reason_of
from understudy.recipes.label_weights import labels_section
from understudy.recipes.prune_step import NUM_SCORED, Made, prune_step
from understudy.recipes.pruned_speed import time_pruned
from understudy.recipes.quantize_step import quantize_step
from understudy.recipes.run import Run
from understudy.recipes.schema import MeasurementSection
from understudy.recipes.step_limits import Counted, LimitsVerdict, judge_limits
from understudy.train.settings import TrainSettings


@dataclass(frozen=True)
class State:
    """A state of the student with what is known of it on the validation split.

    ``number`` is that of the step that made it, 0 of the student as it was trained.
    """

    network: Network
    record: Record
    metrics: dict[str, Any]
    budget: list[dict[str, Any]]
    number: int = 0


def check_compression(run: Run) -> None:
    """Raise one InputError for what is sure to fail later; to be known before training.

    A step has nothing to learn from, or its package is not installed.
    """
    problems: list[str] = []
    for step in run.recipe.compression.steps:
        problems += problems_of(lambda step=step: is_guided(run, step))  # type: ignore[misc]
        is_aware = isinstance(step, QuantizeStep) and step.method == "aware"
        needed = "torch-pruning" if isinstance(step, PruneStep) else "torchao" if is_aware else None
        if needed is not None and find_spec(needed.replace("-", "_")) is None:
            problems += MissingExtraError(needed, "compress").problems
    if problems:
        raise InputError(*dict.fromkeys(problems))


def compress(run: Run) -> Record:
    """Run every step of the recipe; return the record of what is left.

    Raises:
        InputError: a stage before is missing, a limit cannot be reached, or there are no
            calibration pictures.
    """
    check_compression(run)
    state = trained_student(run)
    records, verdicts = [state.record], {}
    limits: dict[int, Record] = {}
    for number, step in enumerate(run.recipe.compression.steps, start=1):
        record = run_step(run, number, step, state)
        records.append(record)
        if not record.payload["kept"]:
            continue
        after = Counted(number, record, Network.from_json(record.payload["network"]))
        verdict = verdicts[record.kind] = limits_verdict(run, step, state, after, limits)
        if not reason_of(verdict.rows):
            state = after_step(number, record)
    compressed = finish(run, records, verdicts, state)
    time_pruned(run, compressed)
    return compressed


def limits_verdict(
    run: Run,
    step: PruneStep | QuantizeStep,
    state: State,
    after: Counted,
    limits: dict[int, Record],
) -> LimitsVerdict:
    """Return what the limits on shipped files say of a step that kept its other gates.

    Args:
        after: what the step made of the state.
        limits: as ``judge_limits`` takes them.
    """
    if not (step.gates or run.recipe.compression.gates).budget:
        return LimitsVerdict()
    before = Counted(state.number, state.record, state.network)
    verdict = judge_limits(run, before, after, limits)
    if reason := reason_of(verdict.rows):
        log.info("%s: taken back: %s", after.record.kind, reason)
    elif verdict.later:
        log.info("%s: judged at the release: %s", after.record.kind, ", ".join(verdict.later))
    return verdict


def finish(
    run: Run, records: list[Record], verdicts: Mapping[str, LimitsVerdict], state: State
) -> Record:
    """Return the record of the whole compression.

    Args:
        records: of the trained student and of every step.
        state: what is left.
    """
    reasons = {kind: reason_of(verdict.rows) for kind, verdict in verdicts.items()}
    taken_back = {kind: reason for kind, reason in reasons.items() if reason}
    asked = [record for verdict in verdicts.values() for record in verdict.records]
    judged = {kind: verdict.to_json() for kind, verdict in verdicts.items() if verdict.records}
    stage = run.begin(
        KIND,
        section=run.recipe.section(KIND),
        parents={record.kind: record.hash for record in (*records, *asked)},
        # What is timed anew may be judged otherwise, and what could not be told before may be now.
        holds=lambda record: (
            record.payload.get("taken_back", {}) == taken_back
            and record.timing.get("limits", {}) == judged
        ),
    )
    if stage.record is not None:
        return stage.record
    payload = {
        "steps": [record.kind for record in records[1:]],
        "network": state.network.to_json(),
        "metrics": state.metrics,
    }
    if taken_back:
        payload["taken_back"] = taken_back
    return stage.finish(payload, timing={"limits": judged})


def trained_student(run: Run) -> State:
    """Return the student as its training and export left it."""
    evaluation = run.parent("evaluation", "evaluate")
    exported = run.parent("export", "export")
    metrics = evaluation.payload["metrics"]["student"]["validation"]
    cost = evaluation.payload["costs"]["student"]
    facts = BudgetFacts(
        num_params=cost["num_params"],
        macs=cost["macs"],
        model_size_bytes=exported.payload["facts"]["size_bytes"],
        measurements=exported.timing["latency"]["measurements"],
        peak_memory_bytes=exported.timing["memory"]["peak_memory_bytes"],
    )
    return State(Network(), run.parent("student", "train"), metrics, budget_rows(run, facts))


def after_step(number: int, record: Record) -> State:
    """Return the state that a kept step left."""
    return State(
        Network.from_json(record.payload["network"]),
        record,
        record.payload["metrics"],
        record.timing["budget"],
        number,
    )


def run_step(run: Run, number: int, step: PruneStep | QuantizeStep, state: State) -> Record:
    """Return the record of one step, run now unless it was finished."""
    gates = step.gates or run.recipe.compression.gates
    kind = f"{KIND}-{number}-{step.name}"
    parents = {state.record.kind: state.record.hash}
    parents["evaluation"] = run.parent("evaluation", "evaluate").hash
    stage = run.begin(kind, section=step_section(run, step, gates), parents=parents)
    if stage.record is not None:
        return stage.record
    judge = Judge(run, gates, state)
    if isinstance(step, PruneStep):
        made = prune_step(run, stage, step, state.network)
    else:
        made = quantize_step(run, stage, step, state.network, judge=judge.passes)
    metrics = validation_of(run, made.logits_NK)
    budget = measured_budget(run, made, stage.folder / made.file)
    rows = judge.rows(metrics, budget if gates.budget else [])
    reason = reason_of(rows)
    verdict = f"taken back: {reason}" if reason else "kept"
    log.info("%s: %.2f %% validation accuracy, %s", kind, 100 * metrics["accuracy"], verdict)
    payload = {
        "name": made.name,
        "kept": not reason,
        "reason": reason,
        "network": made.network.to_json(),
        "metrics": metrics,
        "accuracy_before": state.metrics["accuracy"],
        "num_params": made.num_params,
        "macs": made.macs,
        "file_bytes": (stage.folder / made.file).stat().st_size,
        "float_layers": list(made.network.float_layers),
        "details": made.details,
        "gates": [row.to_json() for row in rows if not row.name.startswith("budget.")],
    }
    # What was measured of time is no part of what was made.
    timed = [row.to_json() for row in rows if row.name.startswith("budget.")]
    timing = {"budget": budget, "budget_gates": timed, "speed": made.speed}
    return stage.finish(payload, files=made.files, timing=timing)


def step_section(run: Run, step: PruneStep | QuantizeStep, gates: Gates) -> dict[str, Any]:
    """Return the parts of the recipe that decide a step."""
    recipe = run.recipe
    section = recipe.section("seed", "views", "device", "distillation", "strategy")
    section |= {"step": step.model_dump(mode="json"), "gates": gates.model_dump(mode="json")}
    section["budget"] = file_budget(run).model_dump(mode="json")
    # Steps are timed in a setting of their own, for so long: the rest stands at its defaults.
    timed = MeasurementSection(min_seconds=recipe.measurement.min_seconds)
    section["measurement"] = timed.model_dump(mode="json")
    if recipe.export.opset != DEFAULT_OPSET:
        section["opset"] = recipe.export.opset
    if step.training is not None:
        section |= smoothing_section(run, step, step.training)
        section |= labels_section(run, step.training, labels_alone=not is_guided(run, step))
    if isinstance(step, QuantizeStep):
        section["largest_weight"] = {"others": WEIGHT_MAX, "depthwise": DEPTHWISE_WEIGHT_MAX}
        if step.method == "aware" and recipe.student.flip_average:
            section["learns_from"] = "one way"  # and not from the mean of both, as it once did
    return section | pictures_section(run, step) | run.live_section


def smoothing_section(
    run: Run, step: PruneStep | QuantizeStep, settings: TrainSettings
) -> dict[str, float]:
    """Return what a key says of a guided step's label smoothing besides the step's own settings.

    It was that of the student's training once, so a step that asks for another is made anew. The
    key of a step of a student that was brought has held it ever since.
    """
    recipe, smoothing = run.recipe, settings.label_smoothing
    differs = smoothing != recipe.training.label_smoothing
    if is_guided(run, step) and (differs or recipe.student.checkpoint is not None):
        return {"label_smoothing": smoothing}
    return {}


def pictures_section(run: Run, step: PruneStep | QuantizeStep) -> dict[str, str]:
    """Return what a step's key says of its pictures where they are not their whole split.

    They were its first ones once, which a folder that is sorted by class has few classes in.
    """
    if isinstance(step, PruneStep):
        is_part = step.importance == "taylor" and len(run.labelled_train_N) > NUM_SCORED
    else:
        most = MAX_FIRST_IMAGES if step.method == "aware" else MAX_CALIBRATION_IMAGES
        is_part = len(run.splits.calibration) > most
    return {"pictures": "spread"} if is_part else {}


@dataclass(frozen=True)
class Judge:
    """Compares what a step made with what went in."""

    run: Run
    gates: Gates
    before: State

    def rows(self, metrics: Mapping[str, Any], budget: list[dict[str, Any]]) -> list[GateRow]:
        """Return one row a gate."""
        rows = check_gates(self.gates, self.before.metrics, metrics)
        return rows + check_budget_kept(self.before.budget, budget)

    def passes(self, logits_NK: Tensor) -> bool:
        """Return whether these answers on the validation split keep the gates on accuracy."""
        return not reason_of(self.rows(validation_of(self.run, logits_NK), []))


def validation_of(run: Run, logits_NK: Tensor) -> dict[str, Any]:
    """Return the metrics of answers on the validation split, against the teacher's."""
    stored = load_file(run.folder / "evaluation" / LOGITS_NAME)
    return evaluate_logits(
        logits_NK,
        run.source.labels_N[run.splits.validation],
        class_names=run.source.class_names,
        teacher_logits_NK=stored.get("teacher.validation"),
    ).to_json()


def measured_budget(run: Run, made: Made, path: Path) -> list[dict[str, Any]]:
    """Return the budget's rows for the ONNX file of a step, measured as far as limits ask."""
    limits = run.recipe.budget
    images_NCHW = run.source.images(run.splits.validation[:100]).numpy()
    measurements: list[dict[str, Any]] = []
    if limits.latency_ms is not None:
        latency = measure_latency(
            path,
            images_NCHW,
            batch_sizes=(limits.latency_ms.batch,),
            num_threads=(limits.latency_ms.threads,),
            min_seconds=run.recipe.measurement.min_seconds,
        )
        measurements = latency.to_json()["measurements"]
    peak = None
    if limits.peak_memory_bytes is not None:
        peak = measure_memory(path, images_NCHW).peak_memory_bytes
    return budget_rows(
        run,
        BudgetFacts(
            num_params=made.num_params,
            macs=made.macs,
            model_size_bytes=path.stat().st_size,
            measurements=measurements,
            peak_memory_bytes=peak,
        ),
    )


def budget_rows(run: Run, facts: BudgetFacts) -> list[dict[str, Any]]:
    """Return the rows of the limits that a file can be asked for."""
    return [row.to_json() for row in check_budget(file_budget(run), facts=facts)]
