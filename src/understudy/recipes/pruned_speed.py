"""Whether pruning saves time in the runtimes that the student is released for.

The step itself is timed in ONNX Runtime. Which runtimes count is for the release to say, and asking
for another one must not prune and fine-tune again: so each is timed in a stage of its own, behind
the last step. What is exported for it is thrown away. The unpruned student is no part of a release,
and int8 files of both are quantised after training alike, so that they differ in their channels
alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from understudy.artifacts import RECORD_NAME, Record
from understudy.errors import MissingExtraError
from understudy.evaluate.browser import run_in_browser
from understudy.evaluate.compare import ratio_of
from understudy.export.target import Artifact, Precision, find_target
from understudy.export.target_names import TARGETS
from understudy.progress import log
from understudy.recipes.artifact_energy import device_of
from understudy.recipes.artifacts import failure_of, wanted_artifacts
from understudy.recipes.compressed import Network, export_source, last_network, steps_of
from understudy.recipes.prune_step import speed_against, speed_of
from understudy.recipes.run import Run

# Each starts the runtime twice. ExecuTorch brings PyTorch with it, and a browser takes seconds too.
NUM_ROUNDS = 5
NUM_SLOW_ROUNDS = 3
SLOW_STARTS = frozenset({"executorch", "web"})
NUM_BROWSER_IMAGES = 20


def speed_kind(target: str, precision: str) -> str:
    """Return the stage that times one runtime."""
    return f"pruned-speed-{target}-{precision}"


def runtimes_of(run: Run, network: Network) -> list[tuple[str, Precision]]:
    """Return target and precision of everything that is released, and of the device; each once."""
    wanted, device = wanted_artifacts(run, network), device_of(run)
    if device is not None:
        wanted.append((device.runtime, device.precision))
    return list(dict.fromkeys(wanted))


def time_pruned(run: Run, compressed: Record) -> None:
    """Time the pruned student against the unpruned one in every runtime that it is released for.

    A runtime that cannot be run says why; that is no error, and it is tried again next time.
    """
    network = last_network(compressed)
    if network.shapes is None:
        return
    for name, precision in runtimes_of(run, network):
        if runs_here(name) and step_speed(run, compressed, name, precision) is None:
            speed_record(run, compressed, name, precision)


def runs_here(name: str) -> bool:
    """Return whether a target's files can be run on this machine; pages are by a browser."""
    return find_target(name).RUNS_HERE or name == "web"


def step_speed(
    run: Run, compressed: Record, name: str, precision: Precision
) -> dict[str, Any] | None:
    """Return the speed that pruning's one step found itself, in float32 in ONNX Runtime."""
    pruned = [
        record.timing["speed"]
        for record in steps_of(run, compressed)
        if record.payload["kept"] and record.timing["speed"] is not None
    ]
    is_known = (name, precision) == ("onnx", "float32") and len(pruned) == 1
    return pruned[0] if is_known else None


def speed_record(run: Run, compressed: Record, name: str, precision: Precision) -> Record:
    """Return the record of one runtime, timed now unless it was before."""
    stage = run.begin(
        speed_kind(name, precision),
        section=run.recipe.section("measurement", "export"),
        parents={compressed.kind: compressed.hash},
        holds=lambda record: not record.timing["reason"],
    )
    if stage.record is not None:
        return stage.record
    speed, reason = None, ""
    try:
        speed = speed_in(run, last_network(compressed), name, precision)
        told = f"pruned {speed['speedup']:.2f} times as fast"
    except MissingExtraError:
        reason = f"needs the extra {TARGETS[name]}"
    except Exception as error:  # a target's own tools raise many kinds
        reason = failure_of(error).rstrip(".")
    log.info("%s/%s: %s", name, precision, f"not measured: {reason}" if reason else told)
    # What was measured is no part of what was made.
    return stage.finish(
        {"target": name, "precision": precision}, timing={"speed": speed, "reason": reason}
    )


def speed_in(run: Run, network: Network, name: str, precision: Precision) -> dict[str, Any]:
    """Return how much faster the pruned student is in a runtime."""
    target = find_target(name)
    states = (Network(float_layers=network.float_layers), replace(network, aware=None))
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        artifacts = []
        for title, state in zip(("unpruned", "pruned"), states, strict=True):
            place = Path(folder) / title
            place.mkdir()
            source = export_source(run, state)
            artifacts.append(target.export(source, place, precision=precision))
        if name == "web":
            return browser_speed(run, artifacts)
        num_rounds = NUM_SLOW_ROUNDS if name in SLOW_STARTS else NUM_ROUNDS
        return speed_against(run, *artifacts, num_rounds=num_rounds)


def browser_speed(run: Run, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """Return how many times as fast the second page is, over neighbouring runs of both."""
    images_NCHW = run.source.images(run.splits.validation[:NUM_BROWSER_IMAGES]).numpy()
    times_ms: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(NUM_SLOW_ROUNDS):
        for number in (1, 0) if turn % 2 else (0, 1):
            found = run_in_browser(artifacts[number], images_NCHW)
            times_ms[number].append(found.latency_p50_ms)
    return speed_of(ratio_of("pruned", times_ms[1], "unpruned", times_ms[0]))


def pruned_speeds(run: Run, compressed: Record) -> list[dict[str, Any]]:
    """Return what is known of every runtime as the report's results hold it; [] if not pruned."""
    network = last_network(compressed)
    if network.shapes is None:
        return []
    rows = []
    for name, precision in runtimes_of(run, network):
        speed, reason = step_speed(run, compressed, name, precision), ""
        if not runs_here(name):
            reason = "it is not run on this machine"
        elif speed is None:
            speed, reason = recorded_speed(run, compressed, name, precision)
        rows.append({"target": name, "precision": precision, "reason": reason, **(speed or {})})
    return rows


def recorded_speed(
    run: Run, compressed: Record, name: str, precision: Precision
) -> tuple[dict[str, Any] | None, str]:
    """Return what was measured behind this compression, or why nothing was."""
    folder = run.folder / speed_kind(name, precision)
    if (folder / RECORD_NAME).exists():
        record = Record.load(folder)
        if record.parents.get(compressed.kind) == compressed.hash:
            return record.timing["speed"], record.timing["reason"]
    return None, f"run `understudy compress {run.folder}`"
