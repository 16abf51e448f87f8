"""What a released C student takes on microcontrollers, where the cross tools are installed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from understudy.data.splits import spread
from understudy.errors import UnderstudyError
from understudy.evaluate.microcontroller import measure_microcontroller
from understudy.export.target import (
    Artifact,
    ExportSource,
    find_target,
    open_artifact,
    run_artifact,
)
from understudy.progress import log
from understudy.recipes.run import Run

# An emulated picture takes a good part of a second for larger students.
NUM_IMAGES = 200
CPUS = ("cortex-m4", "cortex-m7")


def on_microcontrollers(
    run: Run, source: ExportSource, artifact: Artifact
) -> dict[str, dict[str, Any]]:
    """Return flash, RAM and instructions on each core; empty where the cross tools are missing.

    The answers are compared with ONNX Runtime's of the same student in the same precision.
    """
    images_NCHW = run.source.images(spread(run.splits.test, NUM_IMAGES))
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        twin = find_target("onnx").export(source, Path(folder), precision=artifact.precision)
        expected_NK: NDArray[np.float32] = run_artifact(open_artifact(twin), images_NCHW).numpy()
    found: dict[str, dict[str, Any]] = {}
    for cpu in CPUS:
        try:
            cost = measure_microcontroller(
                artifact,
                images_NCHW.numpy(),
                cpu=cpu,  # type: ignore[arg-type]
                expected=expected_NK,
            )
        except UnderstudyError as error:  # missing tools, or a student that is too large
            log.warning("%s: not measured: %s", cpu, "; ".join(error.problems))
            continue
        found[cpu] = cost.to_json()
    return found
