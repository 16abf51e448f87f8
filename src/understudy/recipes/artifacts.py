"""Every set of files that ships: made, proved on real pictures, measured in its own runtime."""

from __future__ import annotations

import dataclasses
import errno
import json
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from understudy.artifacts import RECORD_NAME, Record, write_json
from understudy.compress.quant_affine import WEIGHT_MAX
from understudy.errors import ParityError, UnderstudyError, problem
from understudy.evaluate.accuracy import evaluate_logits
from understudy.evaluate.budget import Budget, LatencyLimit
from understudy.evaluate.c_size import compiled_bytes
from understudy.evaluate.devices import device_budget
from understudy.evaluate.fresh_process import MIN_RUNS, NUM_WARMUP
from understudy.evaluate.latency import Latency, measure_latency
from understudy.evaluate.memory import measure_memory
from understudy.evaluate.tflm_instructions import count_instructions
from understudy.export.artifact_parity import ArtifactParity, check_artifact_parity
from understudy.export.divergence import Divergence, find_divergence
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
from understudy.recipes.compressed import KIND, Network, export_source, last_network
from understudy.recipes.export import parity_pictures, parity_section
from understudy.recipes.int8_loss import float_accuracy, float_state, quantised_afterwards
from understudy.recipes.measuring_tools import can_measure_more, tools_here
from understudy.recipes.run import Run, Stage

# Of one call: a runtime that takes one picture at a time gains nothing from larger ones.
BATCH_SIZE = 100
# So long may the runs of a batch take, picture by picture: the process is stopped after 300 s.
MAX_SECONDS_ONE_BY_ONE = 280.0
# In the folder of an artifact that could not be made: why, and of which compression.
FAILURE_NAME = "failure.json"
# Raised when the same network comes to other int8 files. 1: LiteRT's, TFLM's and ExecuTorch's have
# the steps of the weights that training learned, and the first two normalise pixels without loss.
# 2: those two mirror pictures without rounding them again. 3: depthwise weights take eight bits,
# and what a hard swish or hard sigmoid reads has no range beyond what it tells apart.
INT8_FILES_VERSION = 3
# What every int8 file depends on besides the network, for the keys of stages that make some.
INT8_SECTION = {"largest_weight": WEIGHT_MAX, "files": INT8_FILES_VERSION}


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
    targets = run.recipe.release.targets
    return list(dict.fromkeys(artifact_wanted(text, network) for text in targets))


def artifact_wanted(text: str, network: Network) -> tuple[str, Precision]:
    """Return target and precision of one of the recipe's targets for a state of the student."""
    name, _, precision = text.partition("/")
    return name, precision or network.precision  # type: ignore[return-value]


def make_artifacts(run: Run, compressed: Record) -> list[Record]:
    """Return the record of every artifact of the recipe that could be made.

    One that could not (a tool that is missing, an operator that the target lacks, files that do not
    compute what the network computes) leaves the others alone: see ``failed_artifacts``. It is
    tried again next time.
    """
    network = last_network(compressed)
    # All of one compression name the same, whichever targets were asked for at the time.
    source = export_source(run, network, recipe_hash=compressed.key)
    records = []
    for name, precision in wanted_artifacts(run, network):
        failure = run.folder / artifact_kind(name, precision) / FAILURE_NAME
        failure.unlink(missing_ok=True)
        try:
            records.append(
                make_artifact(run, compressed, source, find_target(name), name, precision)
            )
        except Exception as error:
            reason = failure_of(error)
            log.warning("%s/%s was not made, the others go on: %s", name, precision, reason)
            details = traceback.format_exception(error)
            values = {"reason": reason, KIND: compressed.hash, "traceback": details}
            write_json(failure, values)
    return records


def failure_of(error: Exception) -> str:
    """Return in a sentence why a target's files could not be made.

    Raises:
        OSError: the disk is full, which is no fault of the target.
    """
    # A target's tools may put an error of their own around it.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise cause
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, UnderstudyError):
        return " ".join(error.problems)
    # Not foreseen: of a target's own tools, most of them.
    said = (str(error).strip().splitlines() or ["it said nothing"])[0]
    return f"{type(error).__name__}: {said}"


def failed_artifacts(run: Run, compressed: Record) -> dict[tuple[str, Precision], str]:
    """Return why artifacts of the recipe could not be made of this compression."""
    failed = {}
    for name, precision in wanted_artifacts(run, last_network(compressed)):
        folder = run.folder / artifact_kind(name, precision)
        try:
            found = json.loads((folder / FAILURE_NAME).read_text())
        except (OSError, ValueError):
            continue
        if found[KIND] == compressed.hash and not (folder / RECORD_NAME).exists():
            failed[name, precision] = str(found["reason"])
    return failed


def make_artifact(
    run: Run,
    compressed: Record,
    source: ExportSource,
    target: Target,
    name: str,
    precision: Precision,
) -> Record:
    """Return the record of one artifact, made now unless it was finished."""
    stage = artifact_stage(run, compressed, name, precision)
    if stage.record is not None:
        return stage.record
    artifact = target.export(source, stage.folder, precision=precision)
    if precision == "int8" and (note := quantised_afterwards(run, compressed, name)):
        artifact = dataclasses.replace(artifact, notes=(*artifact.notes, note))
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
    cost = model_cost(source.model, source.image_shape)
    payload = {
        **artifact.to_json(),
        "parity": None if parity is None else parity.to_json(),
        "metrics": metrics,
        "float_accuracy": float_accuracy(run, float_state(run, compressed))
        if precision == "int8"
        else None,
        "num_params": cost.num_params,
        "macs": cost.macs,
        "num_images": 0 if logits_NK is None else len(logits_NK),
    }
    log.info("%s/%s: %d bytes, %s", name, precision, artifact.size_bytes, score_of(payload))
    return stage.finish(payload, files=files_of(artifact), timing=timing)


def artifact_stage(run: Run, compressed: Record, name: str, precision: Precision) -> Stage:
    """Return the stage of one artifact: it is made from the student, for a device, as measured.

    It is made again, to the same files, where tools that measure it were installed since.
    """
    device, limits = device_of(run), release_budget(run).model_dump(mode="json")
    section = run.recipe.section("measurement", "export") | {
        "min_agreement": run.recipe.release.min_agreement,
        "device": None if device is None else device.model_dump(mode="json"),
        "latency": limits["latency_ms"],
    }
    section |= parity_section(run)
    if name == "coreml":
        section["opens"] = "the package"  # and not the manifest in it, as it once was
    if name == "web":
        section["times"] = "nearest rank"  # and not between two runs, as they once were
    if name == "tflm" and limits["strict"]:
        section["strict"] = True
    parents = {compressed.kind: compressed.hash}
    if precision == "int8":
        section |= INT8_SECTION
        compared_with = float_state(run, compressed)
        parents[compared_with.kind] = compared_with.hash
    return run.begin(
        artifact_kind(name, precision),
        section=section,
        parents=parents,
        holds=lambda record: not can_measure_more(record, name),
    )


def score_of(payload: Mapping[str, Any]) -> str:
    """Return an artifact's accuracy in words, of int8 also what it lost."""
    if payload["metrics"] is None:
        return "not run here"
    accuracy, before = payload["metrics"]["accuracy"], payload["float_accuracy"]
    told = f"{100 * accuracy:.2f} % on test"
    if before is None:
        return told
    return f"{told}, {100 * (accuracy - before):+.2f} points against the float student"


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

    It is the float network that the files are made from: after quantisation-aware training the one
    with the weights that this left, without the rounding that it learned.
    """
    images_NCHW = run.source.images(parity_pictures(run))
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
    raise parity_error(parity, divergence)


def parity_error(parity: ArtifactParity, divergence: Divergence) -> ParityError:
    """Return the error for files beyond the limits, with the layer at fault if it is one alone."""
    is_float = parity.precision == "float32"
    where = f"the first layer that differs is {divergence.first}"
    mend = "Leave this target out, keep that layer in float, or replace it."
    if divergence.first is None:
        where = (
            f"no single layer differs by more than {divergence.tolerance:g} of its output, so "
            "that small differences add up"
        )
        loosen = "export.parity_tolerance" if is_float else "release.min_agreement"
        mend = f"Leave this target out, or change {loosen} if that is good enough."
        if not is_float:
            mend = f"Train the student with int8 arithmetic (method: aware). {mend}"
    return ParityError(
        problem(
            f"{parity.target}/{parity.precision} differs from the trained network by up to "
            f"{parity.max_abs_difference:.3g}, same answer for {parity.top1_agreement:.2%} of "
            f"{parity.num_images} images; {where}",
            expected=f"at most {parity.tolerance:.3g}"
            if is_float
            else f"the same answer for {parity.min_agreement:.0%}",
            mend=mend,
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
    options, budget = run.recipe.measurement, release_budget(run)
    limit = budget.latency_ms
    # Times of the interpreter for microcontrollers say nothing of one: only asked for if they must.
    is_asked = limit is not None and (artifact.target != "tflm" or budget.strict)
    # One at a time, a batch is so many runs: only the one that the limit asks for.
    takes_batches = artifact.batch == "any"
    batch_sizes = set(options.batch_sizes) if takes_batches else {1}
    num_threads: set[Any] = set(options.num_threads or (1, "all"))
    if limit is not None and is_asked:
        num_threads.add(limit.threads)
        if takes_batches:
            batch_sizes.add(limit.batch)
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
    if limit is not None and not is_measured(limit, latency):
        single_ms = latency.measurements[0].p50_ms
        timing["expected_ms"] = expected_time(limit, single_ms, is_asked=is_asked)
        if not timing["expected_ms"]:
            more = measure_latency(
                artifact,
                images_NCHW,
                batch_sizes=[limit.batch],
                num_threads=[limit.threads],
                min_seconds=options.min_seconds,
            )
            timing["latency"]["measurements"] += more.to_json()["measurements"]
    if artifact.target == "c":
        from understudy.recipes.microcontrollers import on_microcontrollers

        timing["microcontrollers"] = on_microcontrollers(run, source, artifact)
        timing["compiled_bytes"] = compiled_bytes(artifact.folder)
        timing["tools"] = tools_here("c")
    if artifact.target == "tflm":
        timing["tools"] = tools_here("tflm")
        counted = count_instructions(artifact.path, images_NCHW)
        if isinstance(counted, str):
            log.warning("instructions: not measured: %s", counted)
        else:
            timing["instructions"] = counted.to_json()
    timing["energy"] = energy_of(run, artifact, images_NCHW, latency).to_json()
    return timing


def is_measured(limit: LatencyLimit, latency: Latency) -> bool:
    """Return whether a limit's batch and threads are among those that were measured."""
    setting = (limit.batch, limit.threads)
    return setting in {(row.batch_size, row.num_threads) for row in latency.measurements}


def expected_time(limit: LatencyLimit, single_ms: float, *, is_asked: bool) -> str:
    """Return why a batch is not measured as so many single pictures; "" where it is to be.

    The limit is then not measured, with this beside it, and a strict budget fails.
    """
    batch_ms = limit.batch * single_ms
    told = f"{limit.batch} pictures one by one of {single_ms:.3g} ms are {batch_ms:.4g} ms"
    if not is_asked:
        return f"{told} in the interpreter here, which is timed for a strict budget alone"
    seconds = (NUM_WARMUP + MIN_RUNS) * batch_ms / 1e3
    if seconds > MAX_SECONDS_ONE_BY_ONE:
        return f"{told}, and measuring them would take {seconds:.0f} s"
    return ""
