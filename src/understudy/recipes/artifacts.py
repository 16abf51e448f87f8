"""Every set of files that ships: made, proved on real pictures, measured in its own runtime."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from understudy.artifacts import Record
from understudy.compress.quant_affine import WEIGHT_MAX
from understudy.errors import InputError, ParityError, problem
from understudy.evaluate.accuracy import evaluate_logits
from understudy.evaluate.budget import Budget
from understudy.evaluate.devices import device_budget
from understudy.evaluate.latency import measure_latency
from understudy.evaluate.memory import measure_memory
from understudy.export.artifact_parity import ArtifactParity, check_artifact_parity
from understudy.export.divergence import find_divergence
from understudy.export.target import (
    Artifact,
    ExportSource,
    Precision,
    Target,
    find_target,
    open_artifact,
    run_artifact,
)
from understudy.models.cost import model_cost
from understudy.progress import log, shown_progress
from understudy.recipes.artifact_energy import device_of, energy_of
from understudy.recipes.compressed import Network, export_source, last_network
from understudy.recipes.run import Run

# Of one call: a runtime that takes one picture at a time gains nothing from larger ones.
BATCH_SIZE = 100


def artifact_kind(target: str, precision: str) -> str:
    """Return the stage of one set of files."""
    return f"artifact-{target}-{precision}"


def artifact_of(run: Run, record: Record) -> Artifact:
    """Return the files of a record."""
    names = {field.name for field in dataclasses.fields(Artifact)} - {"folder"}
    values = {name: record.payload[name] for name in names}
    values |= {"files": tuple(values["files"]), "notes": tuple(values["notes"])}
    return Artifact(folder=run.folder / record.kind, **values)


def release_budget(run: Run) -> Budget:
    """Return the limits of the recipe, and of its device where the recipe has none.

    What is not measured fails if either of the two is strict.
    """
    device, own = device_of(run), run.recipe.budget
    limits = {} if device is None else device_budget(device)
    strict = own.strict or limits.get("strict", False)
    own_limits = own.model_dump(exclude_none=True)
    return Budget.model_validate({**limits, **own_limits, "strict": strict})


def wanted_artifacts(run: Run, network: Network) -> list[tuple[str, Precision]]:
    """Return target and precision of everything that the recipe ships."""
    wanted: list[tuple[str, Precision]] = []
    for text in run.recipe.release.targets:
        name, _, precision = text.partition("/")
        wanted.append((name, precision or network.precision))  # type: ignore[arg-type]
    return list(dict.fromkeys(wanted))


def make_artifacts(run: Run, compressed: Record) -> list[Record]:
    """Return the record of every artifact of the recipe.

    Raises:
        InputError: a target has no such precision.
        MissingExtraError: a target's package is not installed; nothing is lost.
        ModelError: an operator that a target lacks, with its layer.
        ParityError: files that do not compute what the network computes, with the first layer
            that differs.
    """
    network = last_network(compressed)
    wanted = wanted_artifacts(run, network)
    for name, precision in wanted:
        if precision not in find_target(name).PRECISIONS:
            raise InputError(
                problem(
                    f"the target {name} cannot be {precision}",
                    expected=f"{name}/{' or '.join(find_target(name).PRECISIONS)}",
                    mend="Correct release.targets.",
                )
            )
    source = export_source(run, network)
    return [
        make_artifact(run, compressed, source, find_target(name), name, precision)
        for name, precision in wanted
    ]


def make_artifact(
    run: Run,
    compressed: Record,
    source: ExportSource,
    target: Target,
    name: str,
    precision: Precision,
) -> Record:
    """Return the record of one artifact, made now unless it was finished."""
    device, limits = device_of(run), release_budget(run).model_dump(mode="json")
    section = run.recipe.section("measurement", "export") | {
        "min_agreement": run.recipe.release.min_agreement,
        "device": None if device is None else device.model_dump(mode="json"),
        "latency": limits["latency_ms"],
    }
    if precision == "int8":
        section["largest_weight"] = WEIGHT_MAX
    stage = run.begin(
        artifact_kind(name, precision),
        section=section,
        parents={compressed.kind: compressed.hash},
    )
    if stage.record is not None:
        return stage.record
    artifact = target.export(source, stage.folder, precision=precision)
    parity: ArtifactParity | None = None
    logits_NK: Tensor | None = None
    metrics: dict[str, Any] | None = None
    timing: dict[str, Any] = {}
    if name == "web":
        from understudy.recipes.web_artifact import in_browser

        logits_NK, parity, timing = in_browser(run, source, artifact)
    elif target.RUNS_HERE:
        parity = proved(run, source, target, artifact)
        logits_NK = answers(run, artifact, run.splits.test)
        timing = measured(run, source, artifact)
    if logits_NK is not None:
        labels_N = run.source.labels_N[run.splits.test]
        found = evaluate_logits(logits_NK, labels_N, class_names=run.source.class_names)
        metrics = found.to_json()
    payload = {
        **artifact.to_json(),
        "parity": None if parity is None else parity.to_json(),
        "metrics": metrics,
        "num_params": model_cost(source.model, source.image_shape).num_params,
        "num_images": 0 if logits_NK is None else len(logits_NK),
    }
    shown = "not run here" if metrics is None else f"{100 * metrics['accuracy']:.2f} % on test"
    log.info("%s/%s: %d bytes, %s", name, precision, artifact.size_bytes, shown)
    return stage.finish(payload, files=files_of(artifact), timing=timing)


def files_of(artifact: Artifact) -> list[str]:
    """Return the names of all files, those in folders such as an .mlpackage one by one."""
    names: list[str] = []
    for name in artifact.files:
        path = artifact.folder / name
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        names += [str(p.relative_to(artifact.folder)) for p in inside]
    return list(dict.fromkeys(names))


def proved(run: Run, source: ExportSource, target: Target, artifact: Artifact) -> ArtifactParity:
    """Return the comparison with the network; where it fails, find the layer and raise.

    Int8 files are compared with the network that quantisation-aware training left in int8, or
    with the float one.
    """
    images_NCHW = run.source.images(run.splits.test[: run.recipe.export.num_parity_images])
    parity = check_artifact_parity(
        source.model,
        artifact,
        images_NCHW,
        tolerance=run.recipe.export.parity_tolerance,
        min_agreement=run.recipe.release.min_agreement,
    )
    if parity.passed:
        return parity
    divergence = find_divergence(source, target, images_NCHW[:32], precision=artifact.precision)
    raise ParityError(
        problem(
            f"{artifact.target}/{artifact.precision} differs from the trained network by up to "
            f"{parity.max_abs_difference:.3g}, same answer for {parity.top1_agreement:.2%} of "
            f"{parity.num_images} images; the first layer that differs is {divergence.first}",
            expected=f"at most {parity.tolerance:.3g}"
            if artifact.precision == "float32"
            else f"the same answer for {run.recipe.release.min_agreement:.0%}",
            mend="Leave this target out, keep that layer in float, or replace it.",
        )
    )


def answers(run: Run, artifact: Artifact, indices_N: Tensor) -> Tensor:
    """Return the files' own logits_NK of the pictures at ``indices_N``."""
    found: list[Tensor] = []
    running = open_artifact(artifact)
    with shown_progress(f"pictures in {artifact.target}/{artifact.precision}") as progress:
        for images_NCHW in run.source.iter_images(torch.split(indices_N, BATCH_SIZE)):
            found.append(run_artifact(running, images_NCHW))
            progress(sum(map(len, found)), len(indices_N))
    return torch.cat(found)


def measured(run: Run, source: ExportSource, artifact: Artifact) -> dict[str, Any]:
    """Return times and memory in a process of its own, and what a target adds to that."""
    images_NCHW = run.source.images(run.splits.test[:BATCH_SIZE]).numpy()
    options, limit = run.recipe.measurement, release_budget(run).latency_ms
    # One at a time, a batch is so many runs; the interpreters of microcontrollers are slow here.
    batch_sizes = set(options.batch_sizes) if artifact.batch == "any" else {1}
    num_threads: set[Any] = set(options.num_threads or (1, "all"))
    if limit is not None and artifact.target != "tflm":
        batch_sizes.add(limit.batch)
        num_threads.add(limit.threads)
    latency = measure_latency(
        artifact,
        images_NCHW,
        batch_sizes=sorted(batch_sizes),
        num_threads=sorted(num_threads, key=str),
        min_seconds=options.min_seconds,
    )
    timing: dict[str, Any] = {
        "latency": latency.to_json(),
        "memory": measure_memory(artifact, images_NCHW).to_json(),
    }
    if artifact.target == "c":
        from understudy.recipes.microcontrollers import on_microcontrollers

        timing["microcontrollers"] = on_microcontrollers(run, source, artifact)
    timing["energy"] = energy_of(run, artifact, images_NCHW, latency).to_json()
    return timing
