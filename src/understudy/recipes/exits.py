"""The stage of early exits: a policy for the target, the files, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.artifacts import Record
from understudy.data.splits import spread
from understudy.errors import InputError, problem
from understudy.evaluate.accuracy import predict_logits
from understudy.evaluate.exit_file import check_choice, exit_latencies_ms, mean_time_ms
from understudy.evaluate.exit_policy import (
    CurvePoint,
    ExitPolicy,
    ExitSearch,
    apply_policy,
    fit_temperature,
)
from understudy.export.exits import ExitWriter
from understudy.export.parity import check_parity, require_parity
from understudy.heads.exits import ExitNetwork, SingleExit, exit_macs
from understudy.models.onnx_cost import onnx_cost
from understudy.progress import log, shown_progress
from understudy.recipes.exit_settings import ExitsSection
from understudy.recipes.exit_training import trained_exits
from understudy.recipes.export import parity_pictures, parity_section
from understudy.recipes.run import Run

CHOICE_NAME = "student_exits.onnx"
LAST = "last"
# Enough that the mix of easy and hard pictures is that of the split.
NUM_TIMED_IMAGES = 256


def exits(run: Run) -> Record:
    """Choose thresholds on the validation split, export every exit and the choice, test once.

    Raises:
        InputError: the recipe has no exits, the student no side heads, or no policy reaches the
            target.
        ParityError: a file does not compute what the network computes.
    """
    settings = require_exits(run)
    student = run.parent("student", "train")
    section = run.recipe.section("exits", "export", "measurement") | parity_section(run)
    stage = run.begin("exits", section=section, parents={"student": student.hash})
    if stage.record is not None:
        return stage.record
    network = trained_exits(run, student)
    writer = ExitWriter(
        network,
        image_shape=run.source.image_shape,
        class_names=run.source.class_names,
        opset=run.recipe.export.opset,
    )
    metadata = {"recipe_hash": student.key}
    facts = export_exits(run, stage.folder, network, writer, metadata)
    latencies_ms = measure_exits(run, writer)
    macs = exit_macs(network, run.source.image_shape)
    logits = {"validation": all_exit_logits(run, network, run.splits.validation)}
    policy, curve = calibrate(run, logits["validation"], macs, latencies_ms)
    choice = writer.write_choice(
        stage.folder / CHOICE_NAME,
        thresholds=policy.thresholds,
        temperatures=policy.temperatures,
        metadata=metadata,
    )
    logits["test"] = all_exit_logits(run, network, run.splits.test)
    payload = {
        "layers": [*network.layers, LAST],
        "macs": list(macs),
        "files": facts,
        "target": [settings.policy.target, settings.policy.at_most],
        "policy": policy.to_json(),
        **split_results(run, logits, policy, macs),
        "curve": [point.to_json() for point in curve],
        "choice": {
            "facts": choice.to_json(),
            "parity": choice_parity(run, stage.folder, logits["test"], policy),
        },
    }
    return stage.finish(
        payload,
        files=[CHOICE_NAME, *(row["name"] for row in facts)],
        timing={"latency": time_facts(run, stage.folder, latencies_ms)},
    )


def require_exits(run: Run) -> ExitsSection:
    """Return the recipe's exits, or raise InputError where there are none."""
    if run.recipe.exits is None:
        raise InputError(
            problem(
                f"the recipe of {run.folder} has no exits",
                expected="a section exits with layers",
                mend="Add it, and run `understudy distill`.",
            )
        )
    return run.recipe.exits


def file_name(number: int) -> str:
    """Return the name of the file of one exit."""
    return f"exit_{number}.onnx"


def export_exits(
    run: Run,
    folder: Path,
    network: ExitNetwork,
    writer: ExitWriter,
    metadata: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Write every exit as a file of its own, prove what it computes, and count what is in it."""
    options = run.recipe.export
    images_NCHW = run.source.images(parity_pictures(run))
    rows = []
    for number in range(network.num_exits):
        path = folder / file_name(number)
        facts = writer.write_exit(path, number, metadata=metadata)
        parity = check_parity(
            SingleExit(network, number), path, images_NCHW, tolerance=options.parity_tolerance
        )
        require_parity(parity, path)
        num_params, macs, _, _ = onnx_cost(path)
        counted = {"num_nodes": facts.num_nodes, "size_bytes": facts.size_bytes}
        counted |= {"num_params": num_params, "macs": macs}  # type: ignore[dict-item]
        rows.append({"name": path.name, **counted, "parity": parity.to_json()})
    return rows


def all_exit_logits(run: Run, network: ExitNetwork, indices_N: Tensor) -> Tensor:
    """Return float32 logits [E, N, K] of every exit for the untouched pictures, in order."""

    def side_by_side(images_NCHW: Tensor) -> Tensor:
        return torch.cat(network(images_NCHW, all_exits=True), dim=1)

    flat = predict_logits(side_by_side, run.source, indices_N)
    return flat.view(len(flat), network.num_exits, -1).transpose(0, 1).contiguous()


def exit_accuracies(logits_ENK: Tensor, labels_N: Tensor) -> list[float]:
    """Return the accuracy of every exit on all pictures."""
    right_EN = logits_ENK.argmax(dim=2) == labels_N
    return [float(value) for value in right_EN.double().mean(dim=1)]


def measure_exits(run: Run, writer: ExitWriter) -> tuple[float, ...]:
    """Return the median time in ms of leaving at each exit."""
    images_NCHW = run.source.images(run.splits.validation[:8])
    with shown_progress("measuring the exits") as progress:
        return exit_latencies_ms(
            writer,
            images_NCHW.numpy(),
            num_threads=require_exits(run).policy.num_threads,
            min_seconds=run.recipe.measurement.min_seconds,
            progress=progress,
        )


def calibrate(
    run: Run, logits_ENK: Tensor, macs: Sequence[int], latencies_ms: Sequence[float]
) -> tuple[ExitPolicy, list[CurvePoint]]:
    """Return the policy for the target, and the curve of accuracy against mean multiply-adds."""
    settings = require_exits(run).policy
    labels_N = run.source.labels_N[run.splits.validation]
    temperatures = [1.0] * len(macs)
    if settings.temperature_scaling:
        temperatures = [fit_temperature(logits_NK, labels_N) for logits_NK in logits_ENK]
    by_macs = search = ExitSearch(logits_ENK, labels_N, macs, temperatures)
    if settings.target == "mean_latency_ms":
        search = ExitSearch(logits_ENK, labels_N, latencies_ms, temperatures)
    return search.best(settings.target, settings.at_most), by_macs.curve()


def split_results(
    run: Run, logits: Mapping[str, Tensor], policy: ExitPolicy, macs: Sequence[int]
) -> dict[str, Any]:
    """Return what the policy and each exit alone come to on every split."""
    labels = {name: run.source.labels_N[getattr(run.splits, name)] for name in logits}
    outcomes = {
        name: apply_policy(policy, logits_ENK, labels[name], macs)
        for name, logits_ENK in logits.items()
    }
    accuracies = {
        name: exit_accuracies(logits_ENK, labels[name]) for name, logits_ENK in logits.items()
    }
    log.info(
        "exits: %.2f %% test accuracy at %.0f %% of the multiply-adds (the last exit: %.2f %%)",
        100 * outcomes["test"].accuracy,
        100 * outcomes["test"].mean_cost / macs[-1],
        100 * accuracies["test"][-1],
    )
    return {
        "accuracies": accuracies,
        "outcomes": {name: outcome.to_json() for name, outcome in outcomes.items()},
    }


def choice_parity(run: Run, folder: Path, test_ENK: Tensor, policy: ExitPolicy) -> dict[str, Any]:
    """Return whether the file with the choice decides as the policy on real test pictures."""
    options = run.recipe.export
    some_N = spread(torch.arange(test_ENK.shape[1]), options.num_parity_images)
    parity = check_choice(
        folder / CHOICE_NAME,
        run.source.images(run.splits.test[some_N]),
        test_ENK[:, some_N],
        policy,
        tolerance=options.parity_tolerance,
    )
    return parity.to_json()


def time_facts(run: Run, folder: Path, latencies_ms: tuple[float, ...]) -> dict[str, Any]:
    """Return the times of the exits, and of the choice on a mix of test pictures."""
    images_NCHW = run.source.images(spread(run.splits.test, NUM_TIMED_IMAGES))
    num_threads = require_exits(run).policy.num_threads

    def mean_ms(name: str) -> float:
        return mean_time_ms(
            folder / name,
            images_NCHW,
            num_threads=num_threads,
            min_seconds=run.recipe.measurement.min_seconds,
        )

    return {
        "exit_ms": list(latencies_ms),
        "choice_mean_ms": mean_ms(CHOICE_NAME),
        "last_mean_ms": mean_ms(file_name(len(latencies_ms) - 1)),
        "num_images": len(images_NCHW),
        "num_threads": num_threads,
    }
