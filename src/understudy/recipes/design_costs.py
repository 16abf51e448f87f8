"""What a candidate student costs: size, operations, memory, time in the runtime and in training."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from understudy.evaluate.budget import Budget
from understudy.evaluate.latency import measure_latency
from understudy.evaluate.memory import measure_memory
from understudy.export.onnx_file import export_onnx
from understudy.models.build import NormalizedModel, build_network
from understudy.models.cost import model_cost
from understudy.recipes.networks import build_model
from understudy.recipes.rank_probe import sharing
from understudy.recipes.run import Run
from understudy.runtime import keep_freed_memory
from understudy.train.loss_table import LOSSES
from understudy.train.optimization import build_optimizer

NUM_TIMED_STEPS = 3
MARGIN = 0.9  # of a limit on time: what is measured again later varies


@dataclass(frozen=True)
class Candidate:
    """A network that fits the budget.

    Attributes:
        peak_activation_bytes: float32, one picture.
        latency_ms: in ONNX Runtime at the setting of the budget (or one picture, one thread).
        step_ms: of training, the least of a few: forward, backward and update, without the data.
        peak_memory_bytes: of the fresh process that runs the file; None where the budget does not
            limit it, or the system does not tell.
    """

    number: int
    name: str
    arguments: dict[str, Any]
    num_params: int
    macs: int
    peak_activation_bytes: int
    model_size_bytes: int = 0
    latency_ms: float = 0.0
    step_ms: float = 0.0
    peak_memory_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def counted(run: Run, number: int, name: str, arguments: dict[str, Any]) -> Candidate:
    """Return a candidate with the costs that need no clock."""
    model = candidate_model(run, name, arguments)
    cost = model_cost(model, run.source.image_shape)
    peak = cost.peak_activation_bytes
    assert cost.macs is not None, "a network of torch is counted"
    assert peak is not None, "a network of torch is counted"
    return Candidate(number, name, arguments, cost.num_params, cost.macs, peak)


def num_params_of(run: Run, name: str, arguments: dict[str, Any]) -> int:
    """Return a network's parameters without making them, which takes a fraction of the time."""
    with torch.device("meta"):
        network = build_network(
            name,
            num_classes=len(run.source.class_names),
            image_shape=run.source.image_shape,
            arguments=arguments,
        )
    return sum(parameter.numel() for parameter in network.parameters())


def candidate_model(run: Run, name: str, arguments: dict[str, Any]) -> NormalizedModel:
    """Return the network with its first weights; what it costs does not depend on them."""
    return build_model(with_student(run, name, arguments), "student")


def with_student(run: Run, name: str, arguments: dict[str, Any]) -> Run:
    """Return the run with another student and the same data at hand."""
    model = run.recipe.student.model.model_copy(update={"name": name, "arguments": arguments})
    recipe = run.recipe.model_copy(
        update={"student": run.recipe.student.model_copy(update={"model": model})}
    )
    return sharing(Run(recipe, run.folder, run.home), run, "source", "splits")


def counts_fit(candidate: Candidate, budget: Budget) -> bool:
    """Return whether parameters, operations and memory keep the budget, where it limits them."""
    limits = (
        (candidate.num_params, budget.num_params),
        (candidate.macs, budget.macs),
        (4 * candidate.num_params, budget.model_size_bytes),
        (candidate.num_params, budget.flash_bytes),  # int8: a byte a weight, and code besides
        (candidate.peak_activation_bytes // 4, budget.ram_bytes),
    )
    return all(limit is None or value <= limit for value, limit in limits)


def timed(run: Run, candidate: Candidate, folder: Path) -> Candidate:
    """Return the candidate with latency, file size and the time of a training step."""
    model = candidate_model(run, candidate.name, candidate.arguments)
    path = folder / f"{candidate.number:04d}.onnx"
    source, limit = run.source, run.recipe.budget.latency_ms
    export_onnx(model, path, image_shape=source.image_shape, class_names=source.class_names)
    batch, threads, percentile = (1, 1, 50)
    if limit is not None:
        batch, threads, percentile = limit.batch, limit.threads, limit.percentile
    images = source.images(run.splits.train[:batch]).numpy()
    found = measure_latency(
        path,
        images,
        batch_sizes=[batch],
        num_threads=[threads],
        min_seconds=min(0.3, run.recipe.measurement.min_seconds),
    )
    row = found.measurements[0].to_json()
    memory = None
    if run.recipe.budget.peak_memory_bytes is not None:
        memory = measure_memory(path, images)  # as of every file: one picture
    values = candidate.to_json() | {
        "latency_ms": row[f"p{percentile}_ms"],
        "model_size_bytes": path.stat().st_size,
        "step_ms": step_ms(run, model),
        "peak_memory_bytes": None if memory is None else memory.peak_memory_bytes,
    }
    path.unlink()
    return Candidate(**values)


def step_ms(run: Run, model: NormalizedModel) -> float:
    """Return the time of one training step on the recipe's batch, the least of a few."""
    keep_freed_memory()  # as every training does
    settings, source = run.recipe.training, run.source
    batch_N = run.splits.train[: settings.batch_size]
    images, labels_N = source.images(batch_N), source.labels_N[batch_N].clamp(min=0)
    if settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer((model,), settings.optimizer)
    model.train()
    times = []
    for _ in range(NUM_TIMED_STEPS + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels_N).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times[1:])


def untimed(run: Run) -> str:
    """Return what of the recipe's training is not in the step that is measured; empty: nothing.

    That step is the student's alone, with cross-entropy, in float32, in this process. What losses
    on logits and stored outputs add to it is little.
    """
    recipe = run.recipe
    device, losses = recipe.device, recipe.distillation.losses
    on_features = [name for name in losses if LOSSES[name].reads != "logits"]
    on_gpu = device.accelerator == "cuda" or (
        device.accelerator == "auto" and torch.cuda.is_available()
    )
    reasons = {
        "GPU": on_gpu,
        f"{device.num_processes} processes": device.num_processes > 1,
        recipe.training.precision: recipe.training.precision != "float32",
        "compiled network": recipe.training.compile,
        f"strategy {recipe.strategy.name}": not recipe.strategy.stored,
        "teacher that answers live": recipe.labelling.live,
        ", ".join(on_features): bool(on_features),
    }
    return " and no ".join(reason for reason, holds in reasons.items() if holds)


def train_hours(run: Run, candidate: Candidate) -> float:
    """Return the time of the recipe's whole training with this student, without the data."""
    settings = run.recipe.training
    num_steps = settings.num_epochs * (len(run.splits.train) // settings.batch_size)
    return candidate.step_ms * num_steps / 3.6e6


def times_fit(run: Run, candidate: Candidate) -> bool:
    """Return whether latency, memory, file and training keep the budget, times with a margin."""
    budget = run.recipe.budget
    latency, hours = budget.latency_ms, budget.train_hours
    limits = (
        (candidate.latency_ms, None if latency is None else MARGIN * latency.at_most),
        (train_hours(run, candidate), None if hours is None or untimed(run) else MARGIN * hours),
        (candidate.model_size_bytes, budget.model_size_bytes),
        (candidate.peak_memory_bytes or 0, budget.peak_memory_bytes),
    )
    return all(limit is None or value <= limit for value, limit in limits)


def costs_text(run: Run, candidate: Candidate) -> str:
    """Return every figure of a timed candidate that a budget may limit, in words."""
    told = [
        f"{candidate.num_params:,} parameters",
        f"{candidate.macs:,} multiply-adds",
        f"{candidate.peak_activation_bytes:,} bytes of activations",
        f"a file of {candidate.model_size_bytes:,} bytes",
        f"{candidate.latency_ms:.3g} ms",
        f"{train_hours(run, candidate):.3g} h of training",
    ]
    if candidate.peak_memory_bytes is not None:
        told.append(f"{candidate.peak_memory_bytes:,} bytes of memory")
    return ", ".join(told)
