"""The step that prunes: rounds of removing channels and fine-tuning, timed against before."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from understudy.artifacts import atomic_path, write_json
from understudy.compress.prune import (
    PruneGoal,
    PruneRule,
    check_reachable,
    network_size,
    prune_round,
    round_goals,
)
from understudy.compress.prune_search import Measure
from understudy.compress.settings import PruneStep
from understudy.data.splits import spread
from understudy.evaluate.accuracy import predict_logits
from understudy.evaluate.compare import NUM_ROUNDS, compare_artifacts
from understudy.evaluate.latency import measure_latency
from understudy.evaluate.runtime_files import Source
from understudy.export.onnx_file import export_onnx
from understudy.models.reshape import apply_channel_shapes, channel_shapes
from understudy.progress import log
from understudy.recipes.compressed import SHAPES_NAME, Network, load_network, onnx_path
from understudy.recipes.further_training import further_plan
from understudy.recipes.networks import WEIGHTS_NAME, build_model
from understudy.recipes.run import Run, Stage
from understudy.recipes.train import run_training
from understudy.train.plan import TrainPlan

FILE_NAME = "student.onnx"
PRUNED_NAME = "pruned.safetensors"
GOALS_NAME = "goals.json"
# Pictures whose gradients rank the channels for the importance "taylor".
NUM_SCORED = 1024


@dataclass(frozen=True)
class Made:
    """What a step made: files in its folder, and its answers on the validation split.

    Attributes:
        file: the ONNX file.
        speed: how much faster the file is than the one before, None where that is not asked.
    """

    name: str
    network: Network
    logits_NK: Tensor
    num_params: int
    macs: int | None
    file: str
    files: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] | None = None


def prune_step(run: Run, stage: Stage, step: PruneStep, before: Network) -> Made:
    """Prune to the step's limits in rounds; what a killed process finished is not done again."""
    model = load_network(run, before)
    example_NCHW = run.source.images(run.splits.train[:2])
    measure = partial(picture_ms, run) if step.latency_ms is not None else None
    rule = PruneRule(step.importance, step.scope, step.round_to)
    goals = goals_of(stage.folder / GOALS_NAME, step, model, example_NCHW, rule, measure)
    reports = []
    for number, round_goal in enumerate(goals, start=1):
        folder = stage.folder / f"round-{number}"
        prune_once(run, model, rule, round_goal, folder, measure=measure)
        reports.append(json.loads((folder / "round.json").read_text()))
        if step.training is not None:
            prepare = partial(pruned_training, step=step, number=number)
            run_training(run, "student", folder, precision=step.training.precision, prepare=prepare)
            model = pruned_model(run, folder)
            model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        else:
            model = pruned_model(run, folder)
        model.eval()
    return made(run, stage, step, before, model, reports)


def goals_of(
    path: Path,
    step: PruneStep,
    model: nn.Module,
    example_NCHW: Tensor,
    rule: PruneRule,
    measure: Measure | None,
) -> list[PruneGoal]:
    """Return the goal of each round, found once and kept at ``path``.

    Times differ from one process to the next: measured anew, they would give the rounds that are
    left other goals, or refuse what was begun.
    """
    if path.exists():
        return [PruneGoal(**values) for values in json.loads(path.read_text())]
    goal = PruneGoal(step.num_params, step.num_macs, step.latency_ms)
    size = network_size(model, example_NCHW, measure=measure)
    check_reachable(model, example_NCHW, goal=goal, rule=rule, measure=measure)
    goals = list(round_goals(size, goal, step.num_rounds))
    write_json(path, [asdict(goal) for goal in goals])
    return goals


def made(
    run: Run,
    stage: Stage,
    step: PruneStep,
    before: Network,
    model: nn.Module,
    reports: list[dict[str, Any]],
) -> Made:
    """Write what is left of the rounds, look at it, and time it against what went in."""
    write_json(stage.folder / SHAPES_NAME, channel_shapes(model))
    save_state(model, stage.folder / WEIGHTS_NAME)
    export_onnx(
        model,
        stage.folder / FILE_NAME,
        image_shape=run.source.image_shape,
        class_names=run.source.class_names,
        opset=run.recipe.export.opset,
    )
    size = network_size(model, run.source.images(run.splits.train[:2]))
    return Made(
        name=f"prune ({step.importance}, {step.scope})",
        network=Network(weights=stage.kind, shapes=stage.kind),
        logits_NK=predict_logits(model, run.source, run.splits.validation),
        num_params=size.num_params,
        macs=size.num_macs,
        file=FILE_NAME,
        files=(WEIGHTS_NAME, SHAPES_NAME, FILE_NAME),
        details={"rounds": reports},
        speed=speed_against(run, onnx_path(run, before), stage.folder / FILE_NAME),
    )


def prune_once(
    run: Run,
    model: nn.Module,
    rule: PruneRule,
    goal: PruneGoal,
    folder: Path,
    *,
    measure: Measure | None,
) -> None:
    """Remove channels once and write the result, unless an earlier process did."""
    if (folder / "round.json").exists():
        return
    pruned, report = prune_round(
        model,
        run.source.images(run.splits.train[:2]),
        goal=goal,
        rule=rule,
        score=partial(leave_gradients, run),
        measure=measure,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_state(pruned, folder / PRUNED_NAME)
    write_json(folder / SHAPES_NAME, report.shapes_after)
    facts = {
        "num_params": report.after.num_params,
        "num_macs": report.after.num_macs,
        "channels_before": dict(report.channels_before),
        "channels_after": dict(report.channels_after),
        "fixed": dict(report.fixed),
    }
    log.info("%s: %d parameters, %d multiply-adds", folder.name, *list(facts.values())[:2])
    write_json(folder / "round.json", facts)  # the last file: the round is whole


def save_state(model: nn.Module, path: Path) -> None:
    """Write a network's weights atomically."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary)


def pruned_model(run: Run, folder: Path) -> nn.Module:
    """Return a round's network before its fine-tuning."""
    shapes = json.loads((folder / SHAPES_NAME).read_text())
    model: nn.Module = apply_channel_shapes(build_model(run, "student"), shapes)
    model.load_state_dict(load_file(folder / PRUNED_NAME))
    return model


def pruned_training(
    run: Run, role: str, folder: Path, *, step: PruneStep, number: int
) -> tuple[nn.Module, TrainPlan]:
    """Return a round's network, and what it is fine-tuned with."""
    model = pruned_model(run, folder)
    return model, further_plan(run, model, step, phase=f"prune-{number}", folder=folder)


def leave_gradients(run: Run, model: nn.Module) -> None:
    """Leave the gradients of the labels' loss on some training pictures in the network."""
    indices_N = spread(run.labelled_train_N, NUM_SCORED)
    model.eval()  # batch norm as in use: a batch's own statistics would hide a channel's scale
    for batch_N in torch.split(indices_N, 128):
        logits_NK = model(run.source.images(batch_N))
        loss = functional.cross_entropy(logits_NK, run.source.labels_N[batch_N], reduction="sum")
        torch.autograd.backward(loss / len(indices_N))


def picture_ms(run: Run, model: nn.Module) -> float:
    """Return the median time of one picture in ONNX Runtime with one thread, in milliseconds."""
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        path = Path(folder) / FILE_NAME
        export_onnx(
            model,
            path,
            image_shape=run.source.image_shape,
            class_names=run.source.class_names,
        )
        latency = measure_latency(
            path,
            run.source.images(run.splits.validation[:8]).numpy(),
            batch_sizes=(1,),
            num_threads=(1,),
            min_seconds=0.2,
        )
    return latency.measurements[0].p50_ms


def speed_against(
    run: Run, before: Source, after: Source, *, num_rounds: int = NUM_ROUNDS
) -> dict[str, Any]:
    """Return how many times as fast the second file is, over neighbouring runs of both."""
    images_NCHW = run.source.images(run.splits.validation[:100]).numpy()
    comparison = compare_artifacts(
        (before, after),
        images_NCHW,
        batch_sizes=(1,),
        num_threads=(1,),
        num_rounds=num_rounds,
        min_seconds=min(0.3, run.recipe.measurement.min_seconds),
    )
    return speed_of(asdict(comparison.ratios[0]))


def speed_of(ratio: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ratio of a pruned file's time as how many times as fast it is."""
    return {
        "speedup": 1 / ratio["ratio"],
        "quartiles": [1 / ratio["upper"], 1 / ratio["lower"]],
        "num_rounds": ratio["num_rounds"],
        "before_ms": ratio["reference_p50_ms"],
        "after_ms": ratio["p50_ms"],
    }
